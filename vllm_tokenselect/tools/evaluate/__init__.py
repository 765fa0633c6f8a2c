"""Accuracy of served models: `tokenselect eval`.

Tasks make prompts, a client asks servers that speak OpenAI's API, and answers are scored and written cell
by cell. The summary has rates and losses with their intervals. Nothing here imports vLLM: a server is a
URL.
"""
