//! Image → index: finding every dataset of a file that lies in the page cache.

use std::io::Write;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hornbeam::dtype::DType;
use hornbeam::image::{Engine, hdf5::direct::Direct};
use hornbeam::io::FileSource;
use hornbeam::tree::Tree;

/// An image of `datasets` scalars, four a layer.
fn image(datasets: u64) -> Vec<u8> {
    let mut tree = Tree::new();
    for i in 0..datasets {
        let path = format!("layers/dense_{}/vars/{}", i / 4, i % 4);
        tree.add_dataset(&path, DType::F32, [], vec![]).expect("new");
    }
    let layout = Direct.lay_out(&tree).expect("it is valid");
    let mut image = vec![0; layout.len as usize];
    for (at, bytes) in layout.metadata {
        image[at as usize..][..bytes.len()].copy_from_slice(&bytes);
    }
    image
}

fn index(c: &mut Criterion) {
    let mut group = c.benchmark_group("index");
    for datasets in [2500, 50_000] {
        let mut file = tempfile::tempfile().expect("there is room");
        file.write_all(&image(datasets)).expect("there is room");
        let source = FileSource::new(file).expect("it is a file");
        group.throughput(Throughput::Elements(datasets));
        group.bench_with_input(BenchmarkId::from_parameter(datasets), &source, |b, source| {
            b.iter(|| Direct.index(source).expect("it is valid"));
        });
    }
    group.finish();
}

criterion_group!(benches, index);
criterion_main!(benches);
