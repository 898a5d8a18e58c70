"""From text to a tokenised corpus: sources, cleaning, sentences, tokenizers, the builder and the reader.

Nothing here imports jax, flax or grain: the workers that tokenise are processes of their own. `builder.open_corpus` and
`builder.prepare_corpus` are the ways in, `reader.CorpusReader` is what they give.
"""
