"""The server: OpenAI's interface over HTTP, and texts batched between chunks in one thread.

Needs the extra ``serve``. It stands above `calm.decoding` and below `calm.commands`.
"""
