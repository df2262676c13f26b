"""Requests of prompts that do not all stand in memory: each becomes a group when the engine has room for it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from typing import Any

from jaxpaged.api.request_params import RequestParams
from jaxpaged.api.sampling_params import SamplingParams
from jaxpaged.api.values import is_list, shortened
from jaxpaged.host.sequence import SequenceGroup
from jaxpaged.requests.sources import ReadPrompt

MakeGroup = Callable[[ReadPrompt, RequestParams, str], SequenceGroup]


class PromptReader:
    """Makes the next group, or none: at the end, and behind a prompt that cannot run.

    `error` is then what is wrong with it, for who has taken the results of those before.
    """

    def __init__(self, prompts: Iterator[ReadPrompt], params: Any, request_ids: Any, make_group: MakeGroup):
        self.error: ValueError | None = None
        self._prompts = prompts
        self._params = params
        self._ids = None if request_ids is None else iter(request_ids)
        self._make_group = make_group
        self._numbers = itertools.count()

    def read(self) -> SequenceGroup | None:
        number = next(self._numbers)
        try:
            prompt = next(self._prompts, None)
            if prompt is None:
                self._check_all_used(number)
                return None
            params = self._params_of(number)
            request_id = self._id_of(number)
        except ValueError as error:
            self.error = error
            return None
        try:
            return self._make_group(prompt, params, request_id)
        except ValueError as error:
            self.error = ValueError(f"prompt {number}: {error}")
            return None

    def _params_of(self, number: int) -> RequestParams:
        if not is_list(self._params):
            return SamplingParams() if self._params is None else self._params
        if number >= len(self._params):
            raise ValueError(f"{len(self._params)} sampling_params, and there are more prompts: give one for each")
        return self._params[number]

    def _id_of(self, number: int) -> str:
        if self._ids is None:
            return str(number)
        request_id = next(self._ids, None)
        if not isinstance(request_id, str):
            raise ValueError(f"request_ids: prompt {number} needs a string, got {shortened(request_id)}")
        return request_id

    def _check_all_used(self, number: int) -> None:
        if is_list(self._params) and len(self._params) != number:
            raise ValueError(f"{len(self._params)} sampling_params for {number} prompts: give one, or one for each")
