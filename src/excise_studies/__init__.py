"""The open questions, on top of the public package; found by the entry points `excise.studies`."""
