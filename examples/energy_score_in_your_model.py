"""Use `calm_kernels` in a model of your own: learn a two-sided distribution from draws alone.

The target of each position is a Gaussian around +1 or -1, at random. A regression loss would learn
the middle, which never occurs; the energy score learns both sides, without a likelihood. Runs in
seconds on a CPU.
"""

import torch

from calm_kernels import EnergyHead, gaussian_energy_score

HIDDEN, LATENT, NOISE, ROWS, STEPS = 64, 32, 16, 32, 200


def draw_batch(generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Hidden states of the positions and the mean and log standard deviation of their targets."""
    hidden = torch.randn(ROWS, HIDDEN, generator=generator)
    side = torch.randint(2, (ROWS, 1), generator=generator) * 2.0 - 1.0
    mean = side * torch.ones(ROWS, LATENT)
    return hidden, mean, torch.full_like(mean, 0.2).log()


def share_near_a_mode(head: EnergyHead, generator: torch.Generator) -> tuple[float, float]:
    """Shares of draws nearer to +1 and to -1 than to the middle."""
    hidden, _, _ = draw_batch(generator)
    with torch.no_grad():
        level = head.sample(hidden, num_samples=16, seed=1).mean(-1)  # [N, ROWS]
    return (level > 0.5).float().mean().item(), (level < -0.5).float().mean().item()


def main() -> None:
    """Train, and print what the head has learnt."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    head = EnergyHead(HIDDEN, LATENT, NOISE, num_blocks=2)
    torch.nn.init.normal_(head.final_layer.linears[2].weight, std=HIDDEN**-0.5)
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for step in range(STEPS + 1):
        hidden, mean, log_std = draw_batch(generator)
        samples = head.sample(hidden, num_samples=8, seed=step)  # [8, ROWS, LATENT]
        loss = -gaussian_energy_score(samples, mean, log_std).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            above, below = share_near_a_mode(head, generator)
            print(f"step {step:4}  loss {loss.item():7.3f}  at +1 {above:4.0%}  at -1 {below:4.0%}")


if __name__ == "__main__":
    main()
