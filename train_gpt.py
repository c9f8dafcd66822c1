"The same as `seqgpt train`: python train_gpt.py --batch_size 8 ..."
import sys

from seqgpt.cli import main

if __name__ == "__main__": sys.exit(main(["train", *sys.argv[1:]]))
