"""Report, terminal table and model card: pure functions of the record, without torch."""
