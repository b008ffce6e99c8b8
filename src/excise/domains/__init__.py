"""Domains that are made here, shipped or fetched."""
