"""From a raw row to conversations: its columns decide its shape."""
