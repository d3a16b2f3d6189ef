from setuptools import setup

setup(
    name="kandinsky",
    version="0.2.0",
    description="Kandinsky 2.2 and 2.1 in pure PyTorch: readable, checked against diffusers, fast",
    license="Apache-2.0",
    packages=["kandinsky"],
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.10,<2.14",  # older ones: weights_only=True is not safe
        "transformers>=5.0,<6",  # brings tokenizers, which kandinsky/prompts.py reads prompts with
        "safetensors>=0.4.3",
        "huggingface-hub>=1.0,<3",
        "einops>=0.8",
        "pillow>=10.3",
    ],
    extras_require={"test": ["diffusers==0.42.*", "accelerate", "peft", "pytest", "hypothesis"]},
)
