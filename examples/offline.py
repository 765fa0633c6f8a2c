"""Ask questions about a long document without a server, by vLLM's `LLM`.

python offline.py MODEL DOCUMENT QUESTION
"""

import argparse
from pathlib import Path

from vllm import LLM, SamplingParams


def start_engine(model: str, settings: dict[str, object], **options: object) -> LLM:
    """Load a model whose layers select tokens by these settings."""
    return LLM(
        model,
        attention_backend="TOKENSELECT",
        additional_config={"tokenselect": settings},
        **options,
    )


def ask(engine: LLM, document: str, question: str, **settings: object) -> str:
    """Answer a question about a document, with settings for this request alone."""
    sampling = SamplingParams(temperature=0, max_tokens=64, extra_args=settings or None)
    message = {"role": "user", "content": f"{document}\n\n{question}"}
    [output] = engine.chat([message], sampling, use_tqdm=False)
    return output.outputs[0].text


def main() -> None:
    parser = argparse.ArgumentParser(description="Ask a question about a document, offline.")
    parser.add_argument("model", help="folder or name of a model with a chat template")
    parser.add_argument("document", type=Path, help="text file")
    parser.add_argument("question")
    asked = parser.parse_args()
    document = asked.document.read_text()
    engine = start_engine(asked.model, {"top_k": 1024, "n_local": 256})
    print("selecting 1,024 tokens:", ask(engine, document, asked.question))
    print("selecting 256 tokens:", ask(engine, document, asked.question, tokenselect_top_k=256))
    print("full attention:", ask(engine, document, asked.question, tokenselect="off"))


if __name__ == "__main__":
    main()
