"""Command lines, loops and reports: what measures the toolkit, and what trained the bundled model."""
