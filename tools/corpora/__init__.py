"""Real text and chats for training, from packages of the usual registries."""
