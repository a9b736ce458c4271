"""What every room may use: files written whole, environment variables, comparisons."""
