"""What makes the files that ship, and does not ship itself."""
