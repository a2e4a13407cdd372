"""A recipe that runs all four stages in seconds, on the test split of easy-VQA."""

SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
SMALL = {
    "model": {
        "vision": {**SIZES, "image_size": 16, "patch_size": 8},
        "text": {**SIZES, "num_key_value_heads": 1},
        "tokenizer": {"vocab_size": 300},
    },
    "stages": {
        number: {
            "data": {"source": f"easy_vqa_{'conversations' if number == 3 else 'captions'}", "split": "test"},
            "max_steps": 2,
            "batch_size": 4,
            "device_batch_size": 2,
            "vision_tower_lr": 1e-3 if number > 1 else 0.0,
        }
        for number in range(4)
    },
}
