"""Accuracy of served models: `tokenselect eval`.

Tasks make prompts, a client asks servers that speak OpenAI's API, answers are counted with their intervals,
and written cell by cell. Nothing here imports vLLM: a server is a URL.
"""
