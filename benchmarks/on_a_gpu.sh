#!/usr/bin/env bash
# Everything that is worth measuring on a GPU, one after the other, each with its JSON file; half a minute each on an H100.
#
#     bash benchmarks/on_a_gpu.sh                          # all, to benchmarks/results
#     RESULTS=out bash benchmarks/on_a_gpu.sh lora lora4   # some, to another folder
#
# What fails or takes longer than two minutes is told, and the rest goes on.
set -u
cd "$(dirname "${BASH_SOURCE[0]}")/.."

measure() {
  local name=$1
  shift
  if [[ -n $wanted && " $wanted " != *" $name "* ]]; then return; fi
  echo "== $name: $*"
  timeout 120 "${PYTHON:-python3}" tools/bench.py --mixed_precision bf16 "$@" --json "${RESULTS:-benchmarks/results}/gpu_$name.json" ||
    echo "== $name failed with status $?"
}

wanted="$*"
checkpointed=(--gradient_checkpointing)
adafactor=(--optimizer_type Adafactor --optimizer_args relative_step=False scale_parameter=False --max_grad_norm 0)
fused=(--mode finetune --full_bf16 --fused_backward_pass "${adafactor[@]}" "${checkpointed[@]}")

measure lora
measure lora4 --batch_size 4
measure lora_compiled --torch_compile
measure lora4_compiled --batch_size 4 --torch_compile
measure lora_checkpointing "${checkpointed[@]}"
measure lora4_checkpointing --batch_size 4 "${checkpointed[@]}"
measure finetune_checkpointing --mode finetune "${checkpointed[@]}"
measure finetune4_checkpointing --mode finetune --batch_size 4 "${checkpointed[@]}"
measure finetune_fused "${fused[@]}"
measure finetune_fused_swap60 "${fused[@]}" --blocks_to_swap 60
measure lora_nf4 --base_quant nf4 "${checkpointed[@]}"
measure lora_fp8 --base_quant fp8 "${checkpointed[@]}"
measure lora_swap60 --blocks_to_swap 60 "${checkpointed[@]}"
measure lora_adamw8bit --optimizer_type AdamW8bit
measure lora_host_states --optimizer_states host "${checkpointed[@]}"
measure lora_host_activations --cpu_offload_checkpointing "${checkpointed[@]}"
measure finetune --mode finetune
measure finetune4_compiled --mode finetune --batch_size 4 --torch_compile "${checkpointed[@]}"
