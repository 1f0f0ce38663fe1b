"""Export the EMA of a checkpoint as safetensors, for code that has only a unet and its block.

Of the newest epoch:  python -m edm2.export --config config/cifar10/G.yaml
Another EMA length:   python -m edm2.export --config config/cifar10/G.yaml --sigma_rel 0.1 --out DIR
Writes model.safetensors and config.json, with the constructor's arguments under "network"; needs
the package safetensors (pip install safetensors)."""

import json
from pathlib import Path
from edm2 import checkpoint, diffusion, files, flags
from edm2.config import Index, load_config
from edm2.errors import UserError, command
from edm2.posthoc_ema import load_denoiser

def main():
    """Parse the command line, load the network, write it."""
    p = flags.parser(__doc__, sigma_rel=True, passes=False)
    p.add_argument("--epoch", type=flags.flag(Index), help="checkpoint (default: the newest)")
    p.add_argument("--out", metavar="DIR", help="folder (default: save_dir/export/<epoch>...)")
    args = p.parse_args()
    try:
        from safetensors.torch import save
    except ImportError as e:
        raise UserError(f"{e}: pip install safetensors") from None
    config = load_config(args.config, args.set)
    epoch = checkpoint.find(config, args.epoch)
    net = load_denoiser(config, epoch, sigma_rel=args.sigma_rel).net
    about = {"net_type": config.net_type, "network": diffusion.arguments(config), "epoch": epoch,
             "sigma_rel": args.sigma_rel, **config.model_dump(include={"diffusion", "dataset"}),
             "checkpoint_sha256": files.sha256(checkpoint.path_of(config, epoch))}
    variant = f"{epoch}" + (f"_sigma_rel{args.sigma_rel:g}" if args.sigma_rel else "")
    folder = Path(args.out or Path(config.save_dir) / "export" / variant)
    folder.mkdir(parents=True, exist_ok=True)
    with files.atomic(folder / "model.safetensors") as temporary:
        temporary.write_bytes(save(net.state_dict(), {"format": "pt"}))     # OSError: disk full.
    with files.atomic(folder / "config.json") as temporary:
        temporary.write_text(json.dumps(about, indent=1) + "\n")
    print(f"weights: {folder}/model.safetensors  arguments: {folder}/config.json")

if __name__ == "__main__":
    command(main)()
