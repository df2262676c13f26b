"""What a type checker must find in a user's program: one mistake in each line that says so."""

import jaxpaged
from jaxpaged import LLM, BeamSearchParams, SamplingParams

print(jaxpaged.Sampler)  # mistake: no such name
SamplingParams(4)  # mistake: by name only
SamplingParams(max_token=4)  # mistake: no such field
SamplingParams(temperature="hot")  # mistake: not a number
BeamSearchParams()  # mistake: no width
BeamSearchParams(beam_width=2, early_stopping="always")  # mistake: no such word


def first_text(llm: LLM) -> str:
    return llm.generate("x")[0].outputs[0].token_ids  # mistake: not text
