"""Small tokenizers of each kind that checkpoints have, trained in seconds, and texts that their tokens cut."""

from __future__ import annotations

import io

import sentencepiece
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SCRIPTS = {
    "latin": "the quick brown fox naïve café Straße",
    "cyrillic": "быстрая лиса ёж",
    "arabic": "الثعلب البني السَّريع",
    "devanagari": "तेज़ लोमड़ी क्षेत्र",
    "myanmar": "ကျွန်ုပ် မြန်မာ",
    "cjk": "日本語 漢字 速い狐",
    "hangul": "빠른 갈색 여우 한글",
    "emoji": "😀 👩‍👩‍👧 🏳️‍🌈 ☕ ❤️",
}
#: What the models are trained on: half of the scripts, so that characters of the others fall apart into bytes.
CORPUS = [SCRIPTS[name] for name in ("latin", "cyrillic", "devanagari", "cjk")] * 20

words = st.one_of(*(st.sampled_from(text.split() + list(text)) for text in SCRIPTS.values()))
between = st.sampled_from([" ", "  ", "\n", ". ", "\ufffd"])
texts = st.lists(st.one_of(words, between), min_size=1, max_size=12).map("".join)


def sentencepiece_model(**options) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=model, minloglevel=2, hard_vocab_limit=False, num_threads=1,
        character_coverage=1.0, normalization_rule_name="identity", **{"remove_extra_whitespaces": False} | options,
    )  # fmt: skip
    return model.getvalue()


def byte_level_bpe() -> Tokenizer:
    """GPT-2's kind. Merges of bytes reach over characters: two tokens may share one in its middle."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        CORPUS, trainers.BpeTrainer(vocab_size=330, initial_alphabet=alphabet, show_progress=False)
    )
    return tokenizer


def byte_fallback_bpe() -> Tokenizer:
    """Llama 2's kind as tokenizer.json."""
    vocabulary = {"<unk>": 0, "<s>": 1, "</s>": 2, **{f"<0x{byte:02X}>": 3 + byte for byte in range(256)}}
    for character in "▁" + "".join(map(chr, range(33, 127))):
        vocabulary[character] = len(vocabulary)
    merges = [("▁", "a"), ("▁", "t"), ("h", "e"), ("▁t", "he"), ("▁", "▁")]
    vocabulary |= {left + right: len(vocabulary) + i for i, (left, right) in enumerate(merges)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def unigram() -> Tokenizer:
    """T5's kind."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=200, unk_token="<unk>", special_tokens=["<unk>"], show_progress=False,
        initial_alphabet=sorted(set("".join(SCRIPTS.values()).replace(" ", ""))),
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def save_all(directory) -> dict:
    """One file of each kind -> its path."""
    files = {}
    for name, model in (
        ("spm_bytes", sentencepiece_model(vocab_size=420, byte_fallback=True, model_type="bpe")),
        ("spm_unigram", sentencepiece_model(vocab_size=420, byte_fallback=True, remove_extra_whitespaces=True)),
        ("spm_plain", sentencepiece_model(vocab_size=200, model_type="bpe")),
    ):
        files[name] = directory / name / "tokenizer.model"
        files[name].parent.mkdir()
        files[name].write_bytes(model)
    for name, make in (("byte_level", byte_level_bpe), ("byte_fallback", byte_fallback_bpe), ("unigram", unigram)):
        files[name] = directory / name / "tokenizer.json"
        files[name].parent.mkdir()
        make().save(str(files[name]))
    return files
