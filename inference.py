"The same as `seqgpt infer`: python inference.py --model_path outputs/best_model --mode interactive"
import sys

from seqgpt.cli import main

if __name__ == "__main__": sys.exit(main(["infer", *sys.argv[1:]]))
