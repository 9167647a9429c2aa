"""What `improve` does in a few minutes of a GPU: everything lies on the device, a step is one recording."""
