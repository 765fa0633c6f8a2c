"""What the measuring tools share: servers and their client, prompts, intervals, plots, what is shown."""
