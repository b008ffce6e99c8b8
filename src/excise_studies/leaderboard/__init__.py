"""Methods side by side: equal search, equal cost to the rest, fresh seeds, the worst attack."""
