"""The tasks of `tokenselect eval` for lm-eval itself: a folder for its `--include_path`.

lm_eval run --model local-completions \\
    --model_args model=MODEL,base_url=http://HOST:PORT/v1/completions,tokenizer=TOKENIZER,\\
tokenizer_backend=huggingface,num_concurrent=4,max_length=32768 \\
    --include_path "$(tokenselect eval --lm-eval-tasks)" \\
    --tasks tokenselect_passkey,tokenselect_vt \\
    --metadata '{"max_seq_lengths": [4096, 8192], "samples": 100}'

lm-eval hands the tokenizer of `--model_args` to the generators. `samples` and `depths` are 100 and 10 if
they are not said. Prompts are those of `tokenselect eval` in plain text; with lm-eval's
`--apply_chat_template` they stand in the model's chat template, and are as much longer.
"""

from pathlib import Path

FOLDER = Path(__file__).parent
