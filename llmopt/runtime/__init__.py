"""The torch-free, compiler-free runtime: executors, engine, sampler, tokenizer, chat."""
