//! Archive → members: scanning and checking the directory of a `.keras` file, without and with many assets.

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hornbeam::archive::read::Members;
use hornbeam::archive::write::{Archive, Content};
use hornbeam::io::FileSource;

/// A file with a config and `assets` small assets.
fn file(assets: u64) -> FileSource {
    let file = tempfile::tempfile().expect("there is room");
    let mut sink = &file;
    let mut archive = Archive::new(0, &sink);
    archive.add("config.json", &Content::Bytes(vec![b' '; 100_000]), &mut sink).expect("there is room");
    for i in 0..assets {
        let name = format!("assets/layers/lookup_{i}/vocabulary.txt");
        archive.add(&name, &Content::Bytes(vec![b'x'; 100]), &mut sink).expect("there is room");
    }
    archive.finish(&mut sink).expect("there is room");
    FileSource::new(file).expect("it is a file")
}

fn scan(c: &mut Criterion) {
    let mut group = c.benchmark_group("archive");
    for assets in [2, 10_000] {
        let source = file(assets);
        group.throughput(Throughput::Elements(assets + 1));
        group.bench_with_input(BenchmarkId::from_parameter(assets + 1), &source, |b, source| {
            b.iter(|| Members::open(source).expect("it is valid"));
        });
    }
    group.finish();
}

criterion_group!(benches, scan);
criterion_main!(benches);
