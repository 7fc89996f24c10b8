"""The model's chat template: how it renders chats, and what it says of itself."""
