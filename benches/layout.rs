//! Tree → layout: where every dataset and every byte of metadata goes.

use std::hint::black_box;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hornbeam::dtype::DType;
use hornbeam::image::{Engine, hdf5::direct::Direct};
use hornbeam::tree::Tree;

/// Four datasets a layer, each layer with its name, as Keras saves them.
fn tree(datasets: u64) -> Tree {
    let mut tree = Tree::new();
    for i in 0..datasets {
        let vars = format!("layers/dense_{}/vars", i / 4);
        if i % 4 == 0 {
            tree.add_group(&vars, vec![("name".into(), format!("dense_{}", i / 4).into())]).expect("new");
        }
        tree.add_dataset(&format!("{vars}/{}", i % 4), DType::F32, [64, 40], vec![]).expect("new");
    }
    tree
}

fn layout(c: &mut Criterion) {
    let mut group = c.benchmark_group("layout");
    for datasets in [2500, 50_000] {
        let tree = tree(datasets);
        group.throughput(Throughput::Elements(datasets));
        group.bench_with_input(BenchmarkId::from_parameter(datasets), &tree, |b, tree| {
            b.iter(|| Direct.lay_out(black_box(tree)).expect("it is valid"));
        });
    }
    group.finish();
}

criterion_group!(benches, layout);
criterion_main!(benches);
