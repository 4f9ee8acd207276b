//! File → tensors in aligned memory, CRC checked, by the background thread; the file lies in the page cache.

use std::io::Write;
use std::sync::Arc;

use criterion::{BenchmarkId, Criterion, Throughput, criterion_group, criterion_main};
use hornbeam::io::fetch::{Extent, Fetch, Request};
use hornbeam::io::{FileSource, ReadAt};

fn run(c: &mut Criterion) {
    const LEN: u64 = 256 << 20;
    let bytes: Vec<u8> = (0..LEN).map(|i| (i % 251) as u8).collect();
    let crc = crc32fast::hash(&bytes);
    let mut file = tempfile::tempfile().expect("there is room");
    file.write_all(&bytes).expect("there is room");
    let source: Arc<dyn ReadAt> = Arc::new(FileSource::new(file).expect("it is a file"));

    let mut group = c.benchmark_group("fetch");
    group.sample_size(10).throughput(Throughput::Bytes(LEN));
    for len in [64 << 20, 10 << 10] {
        let tensors: Vec<_> = (0..LEN / len).map(|i| Extent { offset: i * len, len }).collect();
        group.bench_function(BenchmarkId::from_parameter(format!("{} x {len}", tensors.len())), |b| {
            b.iter_with_large_drop(|| {
                let image = Extent { offset: 0, len: LEN };
                let (source, tensors) = (Arc::clone(&source), tensors.clone());
                let request = Request {
                    read_ahead: u64::MAX,
                    crc: Some(crc),
                    decoded: vec![],
                    decode: Box::new(|_, _, _| Ok(())),
                    source,
                    image,
                    tensors,
                };
                let fetch = Fetch::start(request).expect("they are disjoint");
                fetch.complete(&|| Ok(())).expect("the CRC is right");
                fetch
            });
        });
    }
    group.finish();
}

criterion_group!(benches, run);
criterion_main!(benches);
