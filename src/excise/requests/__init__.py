"""What a run, an audit or an inspection is asked to do."""
