#!/bin/sh
# Potara's and FedMosaic's claims with a larger language model, within ten minutes on one H200-class card.
#
#     tests/gpu/claims.sh MODEL DATA OUT [more options of tests.benchmarks.claims]
#
# MODEL: hub id or folder of an instruction-tuned language model; DATA: folder of the scenarios' texts; OUT: folder of the
# finished runs, one line for each client. A second call goes on where the first one stopped. No run begins after nine minutes.
# Searches have three tries, where they have five without this script.
set -eu
model=$1 data=$(realpath "$2") out=$(realpath -m "$3")
if [ -d "$model" ]; then model=$(realpath "$model"); fi
shift 3
cd "$(dirname "$0")/../.."
for experiment in potara fedmosaic; do
    ${PYTHON:-python} -m tests.benchmarks.claims "$experiment" --design smollm2 --base "$model" --data "$data" \
        --found "$out" --minutes "${MINUTES:-4.5}" --tries 3 "$@"
done
