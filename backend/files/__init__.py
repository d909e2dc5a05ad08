"""Model files: what their headers say, read with bounds for files that nobody vouches for; and GGUF files made here.

    gguf_format, gguf_split, gguf_header, ggml_types    GGUF, whole or in parts
    hf_config, hf_types                                 folders of safetensors
    model_kinds, stand_ins                              what is no model that predicts the next token, and what only stands in a model's place
    file_stamps                                         whether a file changed
    imatrix                                             importance matrices
    gguf_writer, quantizer, demo                        making GGUF files
"""
