"""A real chat model, SmolLM2-135M-Instruct, gives the text, the tokens and the answer that transformers gives."""

import pytest
from paths import ROOT

from jaxpaged import LLM, SamplingParams

#: Of the whole prompt, by the tokenizer of transformers.
PROMPT_IDS = [
    1, 9690, 198, 2683, 359, 253, 5356, 5646, 11173, 3365, 3511, 308, 34519, 28, 7018, 411, 407, 19712, 8182, 2, 198,
    1, 4093, 198, 1780, 314, 260, 3575, 282, 4649, 47, 2, 198, 1, 520, 9531, 198,
]  # fmt: skip
MODEL = ROOT / "build" / "smollm2"


@pytest.mark.slow
@pytest.mark.skipif(not MODEL.is_dir(), reason="scripts/make/smollm2.py has not written build/smollm2")
def test_a_real_chat_model_answers_as_in_transformers():
    llm = LLM(MODEL, num_pages=64, max_model_len=512, max_num_seqs=4, dtype="float32")
    question = [{"role": "user", "content": "What is the capital of France?"}]
    (output,) = llm.chat(question, SamplingParams(temperature=0, max_tokens=24))
    assert output.prompt == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert output.prompt_token_ids == PROMPT_IDS
    assert output.outputs[0].token_ids == [504, 3575, 282, 4649, 314, 7042, 30, 2]
    assert (output.outputs[0].text, output.outputs[0].finish_reason) == ("The capital of France is Paris.", "stop")
