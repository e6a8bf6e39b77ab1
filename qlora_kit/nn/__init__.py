"""Modules built of ops."""
