#!/bin/sh
# A call to the micro model's shop, through a running service: kimia up --model checkpoints/micro --port 0 --run "sh checkpoints/micro/examples/call.sh demo"
# Strangers' voices and, but for recall.wav, texts that the model was not trained on. Answers go to the folder that is named.
set -e
out=${1:?name a folder for the answers}
examples=$(dirname "$0")
sampling="--seed 1 --text-temperature 0 --audio-temperature 0"

echo "The caller (order.wav, 2.9 s), as the model writes it down:"
kimia transcribe --server "$KIMIA_SERVER" "$examples/order.wav"
echo "The answer, and where its time went:"
# shellcheck disable=SC2086  # several words
kimia talk "$examples/order.wav" $sampling --out "$out/answer.wav" --waterfall "$out/waterfall.svg"
echo "Another call of two turns: \"my order number is one two three\" (number.wav), then \"what is my order number\" (recall.wav):"
# shellcheck disable=SC2086
kimia talk "$examples/number.wav" $sampling --session call --out "$out/number.wav" 2> "$out/number.txt" || { cat "$out/number.txt" >&2; exit 1; }
# shellcheck disable=SC2086
kimia talk "$examples/recall.wav" $sampling --session call --out "$out/recall.wav" 2> "$out/recall.txt" || { cat "$out/recall.txt" >&2; exit 1; }
