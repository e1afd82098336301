"""The processes that train: how they are started, listened to and ended."""
