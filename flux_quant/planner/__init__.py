"""What fits a device and how long it takes: sizes, rates, graphics cards, plans."""
