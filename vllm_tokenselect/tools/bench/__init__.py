"""Speed of served models, side by side: `tokenselect bench`.

Servers are asked in turn, one request at a time and then at rates of arrivals; what they took of time and
memory, and how much of their context they attended to, is summed up in rows, tables and pictures. Nothing
here imports vLLM: a server is a URL, and a process where it runs on this machine.
"""
