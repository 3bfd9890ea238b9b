"""The rewrites: one technique a file."""
