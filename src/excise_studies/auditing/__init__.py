"""The auditor audited: how often its verdicts are right about models of known truth."""
