"""Small models in the manner of those that people have: convolutional and tabular ones, each with rows to try it on."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - as everyone writes it


def normal(*shape: int) -> Tensor:
    """Draw normal numbers, always the same for a shape."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def whole_numbers(below: int, *shape: int) -> Tensor:
    """Draw whole numbers."""
    return torch.randint(below, shape, generator=torch.Generator().manual_seed(below))


class Residual(nn.Module):
    """Two convolutions beside a shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int = 1) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if stride != 1 or inputs != outputs:
            self.downsample = nn.Sequential(nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        identity = x if self.downsample is None else self.downsample(x)
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += identity
        return self.relu(out)


class ResNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        self.layer1 = nn.Sequential(Residual(4, 4), Residual(4, 4))
        self.layer2 = nn.Sequential(Residual(4, 8, 2), Residual(8, 8))
        self.avgpool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.layer2(self.layer1(x))
        return self.fc(torch.flatten(self.avgpool(x), 1))


class VGG(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        for inputs, outputs in ((3, 4), (4, 8)):
            layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
            layers += [nn.MaxPool2d(2)]
        self.features = nn.Sequential(*layers)
        self.classifier = nn.Sequential(nn.Linear(32, 16), nn.ReLU(True), nn.Dropout(0.5), nn.Linear(16, 5))

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x)
        x = x.view(x.size(0), -1)
        return self.classifier(x)


class DenseLayer(nn.Module):
    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(inputs), nn.Conv2d(inputs, growth, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x, self.conv(F.relu(self.norm(x)))], 1)


class DenseNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.block1 = nn.Sequential(DenseLayer(4, 2), DenseLayer(6, 2))
        self.transition = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1), nn.AvgPool2d(2))
        self.block2 = nn.Sequential(DenseLayer(4, 2), DenseLayer(6, 2))
        self.classifier = nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        features = self.block2(self.transition(self.block1(self.stem(x))))
        pooled = F.adaptive_avg_pool2d(F.relu(features, inplace=True), (1, 1))
        return self.classifier(torch.flatten(pooled, 1))


class Inverted(nn.Module):
    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        hidden = inputs * 3
        self.use_res_connect = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            nn.Conv2d(inputs, hidden, 1, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, hidden, 3, stride, 1, groups=hidden, bias=False),
            nn.BatchNorm2d(hidden),
            nn.ReLU6(inplace=True),
            nn.Conv2d(hidden, outputs, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv(x) if self.use_res_connect else self.conv(x)


class MobileNet(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, 4, 3, 2, 1), Inverted(4, 4, 1), Inverted(4, 8, 2), Inverted(8, 8, 1), nn.AdaptiveAvgPool2d(1)
        )
        self.classifier = nn.Sequential(nn.Dropout(0.2), nn.Linear(8, 5))

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.features(x).mean([2, 3]))


class Inception(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        self.branch1, self.branch3 = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 3, padding=1)
        self.pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), nn.Conv2d(4, 2, 1))
        self.fc = nn.Linear(6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = torch.cat([F.relu(self.branch1(x)), F.relu(self.branch3(x)), self.pool(x)], 1)
        return self.fc(x.mean((2, 3)))


class UNet(nn.Module):
    """Skips that cross the cut beside the bottom: a base model with several outputs."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 8, 3, 2, 1)
        self.up, self.out = nn.ConvTranspose2d(8, 4, 2, 2), nn.Conv2d(8, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        skip = torch.relu(self.down1(x))
        bottom = torch.relu(self.down2(skip))
        return self.out(torch.cat([torch.relu(self.up(bottom)), skip], 1))


class VisionTransformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        self.cls_token = nn.Parameter(normal(1, 1, 8))
        self.positions = nn.Parameter(normal(1, 5, 8))
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, batch_first=True)
        self.encoder = nn.ModuleList([layer, nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)])
        self.norm, self.head = nn.LayerNorm(8), nn.Linear(8, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1) + self.positions
        for block in self.encoder:
            x = block(x)
        return self.head(self.norm(x)[:, 0])


class Towers(nn.Module):
    """One table, whose columns the module picks itself."""

    def __init__(self) -> None:
        super().__init__()
        self.left = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4))
        self.right = nn.Sequential(nn.Linear(2, 8), nn.ReLU(), nn.Dropout(0.5), nn.Linear(8, 4))
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(8, 1))

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.cat([self.left(x[:, :3]), self.right(x[:, 3:])], dim=1))


class WideAndDeep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(10, 4)
        self.deep = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1))
        self.wide = nn.Linear(5, 1)
        self.bias = nn.Parameter(torch.zeros(1))

    def forward(self, item: Tensor, numbers: Tensor) -> Tensor:
        return torch.sigmoid(self.deep(self.embedding(item)) + self.wide(numbers) + self.bias).squeeze(1)


class DeepFM(nn.Module):
    """Embeddings of each column; first order, factorisation machine, and a deep part over all of them."""

    def __init__(self, columns: tuple[str, ...] = ("user", "city", "item", "brand")) -> None:
        super().__init__()
        self.columns = columns
        self.embeddings = nn.ModuleDict({name: nn.Embedding(7, 4) for name in columns})
        self.first = nn.ModuleDict({name: nn.Embedding(7, 1) for name in columns})
        self.deep = nn.Sequential(nn.Linear(4 * len(columns), 8), nn.ReLU(), nn.Linear(8, 1))

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        vectors = torch.stack([self.embeddings[name](inputs[name]) for name in self.columns], dim=1)
        first = sum(self.first[name](inputs[name]) for name in self.columns)
        second = 0.5 * (vectors.sum(1).pow(2) - vectors.pow(2).sum(1)).sum(1, keepdim=True)
        return first + second + self.deep(vectors.flatten(1))


class Cross(nn.Module):
    """Deep and cross network over towers of two parties, of a list of arrays."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(2, 4)
        self.cross = nn.ModuleList([nn.Linear(8, 8) for _ in range(2)])
        self.out = nn.Linear(8, 2)

    def forward(self, x: list[Tensor]) -> Tensor:
        x0 = torch.cat([torch.tanh(self.a(x[0])), torch.tanh(self.b(x[1]))], 1)
        y = x0
        for layer in self.cross:
            y = x0 * layer(y) + y
        return self.out(y)


class TokenTransformer(nn.Module):
    """Every column a token of its own, as an FT-Transformer has them."""

    def __init__(self, columns: int = 4) -> None:
        super().__init__()
        self.tokens = nn.ModuleList([nn.Linear(1, 8) for _ in range(columns)])
        self.encoder = nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True), 1, enable_nested_tensor=False
        )
        self.head = nn.Linear(8, 1)

    def forward(self, x: Tensor) -> Tensor:
        tokens = [layer(column) for layer, column in zip(self.tokens, x.split(1, dim=1), strict=True)]
        return self.head(self.encoder(torch.stack(tokens, 1)).mean(1))


class Readings(nn.Module):
    """A recurrent tower beside a tabular one."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.numbers = nn.LSTM(3, 6, batch_first=True), nn.Linear(4, 6)
        self.head = nn.Bilinear(6, 6, 2)

    def forward(self, series: Tensor, numbers: Tensor) -> Tensor:
        _, (hidden, _) = self.lstm(series)
        return self.head(hidden[-1], torch.relu(self.numbers(numbers)))
