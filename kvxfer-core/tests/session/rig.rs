//! A machine under test whose actions are told as lines: `1> granted 7: 0=g1` is a message on link 1.

use std::collections::BTreeMap;
use std::time::Duration;

use kvxfer_core::gc::GcConfig;
use kvxfer_core::layout::{Group, KvLayout};
use kvxfer_core::pool::{Geometry, PoolStats};
use kvxfer_core::session::{
    Consumer, ConsumerAction, ConsumerConfig, Copied, LoadRequest, Producer, ProducerAction,
    ProducerConfig, PushRange,
};
use kvxfer_core::wire::Message;
use kvxfer_core::wire::message::{Chunk, CommitOutcome, Granted, Memory};
use kvxfer_core::{
    ChunkKey, ClaimId, ErrorKind, GrantId, Incarnation, LinkId, LoadId, OfferId, PostId, SegmentId,
};

/// Chunks of four tokens: one page each, or `pages`; one layer, or more.
pub(crate) fn layout(pages: u32, layers: usize) -> KvLayout {
    KvLayout {
        model: "test".into(),
        dtype: "f32".into(),
        chunk_tokens: 4,
        shard: (0, 1),
        groups: vec![Group { block_tokens: 4 / pages, block_bytes: vec![8; layers] }],
        tags: BTreeMap::new(),
    }
}

pub(crate) fn ms(ms: u64) -> Duration {
    Duration::from_millis(ms)
}

pub(crate) fn attach(layout: KvLayout) -> Message {
    Message::Attach { layout, memory: Memory::Host, paths: Vec::new() }
}

/// Chunks by name.
pub(crate) fn chunks(names: &str) -> Vec<Chunk> {
    names.bytes().map(|name| Chunk { key: ChunkKey([name; 32]), tokens: 4 }).collect()
}

pub(crate) const A: Incarnation = Incarnation([0xA; 16]);
pub(crate) const B: Incarnation = Incarnation([0xB; 16]);

fn list<T: ToString>(items: impl IntoIterator<Item = T>) -> String {
    items.into_iter().map(|item| item.to_string()).collect::<Vec<_>>().join(" ")
}

pub(crate) fn tell(link: LinkId, message: &Message) -> String {
    let text = match message {
        Message::Granted { offer, grants, .. } => {
            format!(
                "granted {offer}: {}",
                list(grants.iter().map(|g| format!("{}=g{}", g.chunk, g.grant)))
            )
        }
        Message::Have { offer, chunks } => format!("have {offer}: {}", list(chunks)),
        Message::Pending { offer, chunks } => format!("pending {offer}: {}", list(chunks)),
        Message::Refused { offer, chunks, .. } => format!("refused {offer}: {}", list(chunks)),
        Message::Withdraw { offer, chunks } => format!("withdraw {offer}: {}", list(chunks)),
        Message::Pushed { offer, chunks } => format!("pushed {offer}: {}", list(chunks)),
        Message::Busy { offer, ahead } => format!("busy {offer}: {ahead} ahead"),
        Message::CommitAck { grant, outcome: CommitOutcome::Indexed } => {
            format!("indexed g{grant}")
        }
        Message::CommitAck { grant, outcome: CommitOutcome::Expired } => {
            format!("expired g{grant}")
        }
        Message::Revoke { grant } => format!("revoke g{grant}"),
        Message::Commit { grant, .. } => format!("commit g{grant}"),
        Message::Abort { grant } => format!("abort g{grant}"),
        Message::FenceAck { grant } => format!("fenced g{grant}"),
        Message::Renew { grants } => {
            format!("renew {}", list(grants.iter().map(|g| format!("g{g}"))))
        }
        Message::Retire { segment, .. } => format!("retire s{segment}"),
        Message::Ask { .. } => "ask".into(),
        Message::Told { .. } => "told".into(),
        Message::Attach { .. } => "attach".into(),
        Message::Offer { offer, chunks, .. } => format!("offer {offer} of {}", chunks.len()),
        Message::Claim { chunks, .. } => format!("claim of {}", chunks.len()),
        Message::Release { keep_from, keep_to, .. } => {
            format!("release, keep {keep_from}..{keep_to}")
        }
        Message::Ended { claim } => format!("ended {claim}"),
        Message::Claimed { claim, status } => {
            format!("claimed {claim}: {} of {}, {:?}", status.ready, status.coming, status.next)
        }
        other => format!("{other:?}"),
    };
    format!("{link}> {text}")
}

/// A consumer. Producers are on links below 9, observers on 9 and above.
pub(crate) struct Decode {
    pub(crate) consumer: Consumer,
    pub(crate) now: Duration,
    /// Questions that were asked, the newest last.
    pub(crate) asks: Vec<u64>,
    /// Probes that are awaited.
    probes: Vec<(LinkId, SegmentId, u64)>,
}

pub(crate) fn config(segments: u32, pages: u32) -> ConsumerConfig {
    ConsumerConfig {
        layout: layout(1, 1),
        geometry: Geometry { segments, pages_per_segment: pages },
        gc: GcConfig { high_watermark: 1.0, low_watermark: 1.0, ..GcConfig::default() },
        grant_ttl: ms(100),
        grant_cap: ms(250),
        fence_timeout: ms(500),
        ask_timeout: ms(50),
        window_pages: 100,
        overtakes: 2,
        lost_ttl: ms(1000),
    }
}

impl Decode {
    pub(crate) fn new(config: ConsumerConfig) -> Self {
        Self {
            consumer: Consumer::new(config).unwrap(),
            now: ms(1000),
            asks: Vec::new(),
            probes: Vec::new(),
        }
    }

    /// A consumer with a pool of that shape, a producer on link 1, an observer on link 9.
    pub(crate) fn with(segments: u32, pages: u32) -> Self {
        let mut decode = Self::new(config(segments, pages));
        decode.join(1, A);
        decode.consumer.observer_connected(decode.now, LinkId(9), Incarnation([9; 16]));
        decode
    }

    pub(crate) fn join(&mut self, link: u64, peer: Incarnation) -> Vec<String> {
        self.consumer.producer_connected(self.now, LinkId(link), peer);
        let mut lines = self.hear(link, attach(layout(1, 1)));
        lines.retain(|line| *line != format!("{link}> attached"));
        lines
    }

    /// A message comes, in order; all that follows.
    pub(crate) fn hear(&mut self, link: u64, message: Message) -> Vec<String> {
        self.consumer.received(self.now, LinkId(link), message).unwrap();
        self.out()
    }

    pub(crate) fn offer(&mut self, link: u64, offer: u64, names: &str) -> Vec<String> {
        let (offer, request) = (OfferId(offer), "r".into());
        self.hear(link, Message::Offer { offer, request, chunks: chunks(names) })
    }

    /// Comes after the probes of all segments that were exported, and those have passed.
    pub(crate) fn commit(&mut self, link: u64, grant: u64) -> Vec<String> {
        for (link, segment, probe) in std::mem::take(&mut self.probes) {
            if self.probed(link.0, segment.0, probe) == [format!("verify s{segment}")] {
                assert_eq!(self.verified(link.0, segment.0, probe, Ok(())), [""; 0]);
            }
        }
        self.commit_now(link, grant)
    }

    pub(crate) fn probed(&mut self, link: u64, segment: u32, probe: u64) -> Vec<String> {
        self.hear(link, Message::Probed { segment: SegmentId(segment), probe, sum: 5, nanos: 9 })
    }

    pub(crate) fn verified(
        &mut self,
        link: u64,
        segment: u32,
        probe: u64,
        result: Result<(), ErrorKind>,
    ) -> Vec<String> {
        let result = result.map_err(|kind| kind.error("not there"));
        self.consumer.verified(self.now, LinkId(link), SegmentId(segment), probe, result);
        self.out()
    }

    pub(crate) fn commit_now(&mut self, link: u64, grant: u64) -> Vec<String> {
        self.hear(link, Message::Commit { grant: GrantId(grant), sums: vec![7] })
    }

    pub(crate) fn fenced(&mut self, link: u64, grant: u64) -> Vec<String> {
        self.hear(link, Message::FenceAck { grant: GrantId(grant) })
    }

    pub(crate) fn claim(&mut self, claim: u64, names: &str) -> Vec<String> {
        let (claim, request, chunks) = (ClaimId(claim), "r".into(), chunks(names));
        self.hear(9, Message::Claim { claim, request, chunks, deadline_ms: 10_000 })
    }

    pub(crate) fn release(&mut self, claim: u64) -> Vec<String> {
        self.hear(9, Message::Release { claim: ClaimId(claim), keep_from: 0, keep_to: 0 })
    }

    pub(crate) fn told(&mut self, link: u64) -> Vec<String> {
        let ask = *self.asks.last().unwrap();
        self.hear(link, Message::Told { ask })
    }

    pub(crate) fn load(&mut self, load: u64, claim: u64, count: u32) -> Vec<String> {
        let (load, claim) = (LoadId(load), ClaimId(claim));
        let request = LoadRequest { load, claim, first_chunk: 0, chunks: count };
        self.consumer.load(self.now, request);
        self.out()
    }

    pub(crate) fn copied(&mut self, load: u64, chunk: u32) -> Vec<String> {
        self.consumer.copied(self.now, Copied { load: LoadId(load), chunk, result: Ok(()) });
        self.out()
    }

    pub(crate) fn corrupt(&mut self, load: u64, chunk: u32) -> Vec<String> {
        let result = Err(ErrorKind::Corrupt.error("other bytes"));
        self.consumer.copied(self.now, Copied { load: LoadId(load), chunk, result });
        self.out()
    }

    pub(crate) fn down(&mut self, link: u64) -> Vec<String> {
        self.consumer.disconnected(self.now, LinkId(link));
        self.out()
    }

    pub(crate) fn dies(&mut self, peer: Incarnation) -> Vec<String> {
        self.consumer.writer_dead(self.now, peer);
        self.out()
    }

    pub(crate) fn replaced(&mut self, segment: u32) -> Vec<String> {
        self.consumer.replaced(self.now, SegmentId(segment));
        self.out()
    }

    /// So much later.
    pub(crate) fn wait(&mut self, time: Duration) -> Vec<String> {
        self.now += time;
        self.consumer.tick(self.now);
        self.out()
    }

    pub(crate) fn pool(&self) -> PoolStats {
        assert_eq!(self.consumer.pages_leaked(), 0);
        self.consumer.pool()
    }

    pub(crate) fn out(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(action) = self.consumer.poll_action() {
            lines.push(match action {
                ConsumerAction::Send { link, message } => {
                    if let Message::Ask { ask } = message {
                        self.asks.push(ask);
                    }
                    tell(link, &message)
                }
                ConsumerAction::Attach { link } => format!("{link}> attached"),
                ConsumerAction::Export { link, segment, generation, probe } => {
                    self.probes.push((link, segment, probe));
                    format!("{link}> segment s{segment}.{generation}")
                }
                ConsumerAction::Verify { segment, .. } => format!("verify s{segment}"),
                ConsumerAction::Copy { load, chunk, grant, .. } => {
                    format!("copy l{load}: {chunk} of g{grant}")
                }
                ConsumerAction::Loaded { load, result } => match result {
                    Ok(()) => format!("loaded l{load}"),
                    Err(error) => format!("failed l{load}: {:?}", error.kind()),
                },
                ConsumerAction::Replace { segment, live } => {
                    format!("replace s{segment}, {} live", live.len())
                }
                ConsumerAction::Close { link, .. } => format!("close {link}"),
            });
        }
        lines
    }
}

/// A producer: its observer on link 0, its consumers on links 1 and above.
pub(crate) struct Prefill {
    pub(crate) producer: Producer,
    pub(crate) now: Duration,
}

impl Prefill {
    /// Of that many consumers and layers; the first consumer is connected on link 1.
    pub(crate) fn new(consumers: usize, layers: usize) -> Self {
        let config = ProducerConfig {
            layout: layout(1, layers),
            consumers,
            hold: ms(1000),
            memory: Memory::Host,
        };
        let producer = Producer::new(config).unwrap();
        let mut prefill = Self { producer, now: ms(1000) };
        assert_eq!(prefill.join(0, 1, A), ["1> attach"]);
        prefill
    }

    pub(crate) fn join(&mut self, index: usize, link: u64, peer: Incarnation) -> Vec<String> {
        self.producer.consumer_connected(index, LinkId(link), peer, Vec::new());
        self.out()
    }

    pub(crate) fn offer(&mut self, offer: u64, names: &str) -> Vec<String> {
        let (offer, request, chunks) = (OfferId(offer), "r".into(), chunks(names));
        self.order(Message::Offer { offer, request, chunks })
    }

    pub(crate) fn withdraw(&mut self, offer: u64) -> Vec<String> {
        self.order(Message::Withdraw { offer: OfferId(offer), chunks: Vec::new() })
    }

    fn order(&mut self, message: Message) -> Vec<String> {
        self.producer.received_from_observer(self.now, LinkId(0), message).unwrap();
        self.out()
    }

    pub(crate) fn hear(&mut self, link: u64, message: Message) -> Vec<String> {
        self.producer.received_from_consumer(self.now, LinkId(link), message).unwrap();
        self.out()
    }

    pub(crate) fn granted(&mut self, link: u64, offer: u64, chunk: u32, grant: u64) -> Vec<String> {
        let extent = kvxfer_core::pool::Extent {
            segment: SegmentId(0),
            page: grant as u32,
            pages: 1,
            group: 0,
        };
        let granted = Granted { chunk, grant: GrantId(grant), extents: vec![extent] };
        let (offer, deadline_ms, grants) = (OfferId(offer), 300, vec![granted]);
        self.hear(link, Message::Granted { offer, deadline_ms, grants })
    }

    pub(crate) fn revoke(&mut self, link: u64, grant: u64) -> Vec<String> {
        self.hear(link, Message::Revoke { grant: GrantId(grant) })
    }

    /// A step that completes chunks of an offer, from the first on; block numbers are chunk numbers.
    pub(crate) fn begin(&mut self, offer: u64, first_chunk: u32, count: u32) -> Vec<String> {
        let blocks = (first_chunk..first_chunk + count).map(|at| vec![vec![at]].into()).collect();
        let range = PushRange { offer: OfferId(offer), first_chunk, blocks };
        self.producer.begin_step(self.now, vec![range]);
        self.out()
    }

    pub(crate) fn layer(&mut self, layer: u32) -> Vec<String> {
        self.producer.layer_ready(layer);
        self.out()
    }

    pub(crate) fn end(&mut self) -> Vec<String> {
        self.producer.end_step();
        self.out()
    }

    pub(crate) fn posted(&mut self, post: u64) -> Vec<String> {
        self.producer.posted(PostId(post), Ok(7));
        self.out()
    }

    pub(crate) fn failed(&mut self, post: u64) -> Vec<String> {
        self.producer.posted(PostId(post), Err(ErrorKind::Io.error("broken")));
        self.out()
    }

    pub(crate) fn down(&mut self, link: u64) -> Vec<String> {
        self.producer.disconnected(self.now, LinkId(link));
        self.out()
    }

    pub(crate) fn wait(&mut self, time: Duration) -> Vec<String> {
        self.now += time;
        self.producer.tick(self.now);
        self.out()
    }

    pub(crate) fn out(&mut self) -> Vec<String> {
        let mut lines = Vec::new();
        while let Some(action) = self.producer.poll_action() {
            lines.push(match action {
                ProducerAction::Send { link, message } => tell(link, &message),
                ProducerAction::Post { post, link, grant, layer, .. } => {
                    format!("post {} on {link}: g{grant} layer {layer}", post.0)
                }
                ProducerAction::Detach { segment, .. } => format!("detach s{segment}"),
            });
        }
        lines
    }
}
