"""Speed of served models, side by side: `tokenselect bench`.

Servers are asked in turn, first one request at a time and then at rates of arrivals. Their times, their
memory and the share of the context that they attended to become rows, tables and plots. Nothing here
imports vLLM: a server is a URL, and also a process if it runs on this machine.
"""
