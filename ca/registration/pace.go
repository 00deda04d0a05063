package registration

import (
	"fmt"
	"hash/maphash"
	"sync"
	"time"

	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/attestor"
)

const (
	// DefaultSVIDsPerPod covers sixteen volumes of one pod, each renewed twice in a life, as often again.
	DefaultSVIDsPerPod = 64
	// MaxSVIDsPerPod is no bound at all.
	MaxSVIDsPerPod = 1 << 30
	// paceWithin is the time in which a pod has as many again where its SVIDs live longer.
	paceWithin = 30 * time.Minute
	// paceShards share out the lock, and each remembers so many pods: a quarter of a million, ten megabytes in all.
	paceShards   = 64
	pacePerShard = 4096
	// paceLooks is how many of a full shard are looked at for one to forget.
	paceLooks = 8
)

// Pace bounds how many SVIDs are issued for one pod: each is an entry of the ledger for a month, and whoever can make a pod
// could have them signed without an end. For a caller in no pod it is the service account.
//
// Each has n places. An SVID takes one, and they come back evenly: all n in the life of an SVID, or in half an hour if that
// is less. It is never asked for more than a map's lookup under a lock that one in sixty-four share.
type Pace struct {
	most   float64
	began  time.Time
	seed   maphash.Seed
	shards [paceShards]paceShard
}

type paceShard struct {
	mu sync.Mutex
	// by is by hash: pods whose hashes are equal share their places. The seed is drawn at the start, so nobody can look
	// for such a name.
	by map[uint64]places
}

// places are those of one pod.
type places struct {
	taken float64
	at    time.Duration // when that was so, since the pace began
}

// NewPace makes a Pace of so many SVIDs a pod; 0 is DefaultSVIDsPerPod.
func NewPace(svidsPerPod int) (*Pace, error) {
	switch {
	case svidsPerPod == 0:
		svidsPerPod = DefaultSVIDsPerPod
	case svidsPerPod < 0 || svidsPerPod > MaxSVIDsPerPod:
		return nil, fmt.Errorf("svidsPerPod: %d does not lie between 0 (the default, %d) and %d", svidsPerPod, DefaultSVIDsPerPod, MaxSVIDsPerPod)
	}
	return &Pace{most: float64(svidsPerPod), began: time.Now(), seed: maphash.MakeSeed()}, nil
}

// take takes a place for an SVID of this life, or refuses: that passes. giveBack is for one that was not signed after all.
func (p *Pace) take(e *attestor.Evidence, life time.Duration) (giveBack func(), err error) {
	key := p.key(e)
	shard := &p.shards[key%paceShards]
	each := time.Duration(float64(min(life, paceWithin)) / p.most)
	shard.mu.Lock()
	defer shard.mu.Unlock()
	at := time.Since(p.began)
	was, known := shard.by[key]
	taken := was.left(at, each)
	if taken+1 > p.most {
		wait := time.Duration((taken+1-p.most)*float64(each)).Truncate(time.Second) + time.Second
		return nil, refusal.New(refusal.PodLimit, "%s had %.0f SVIDs in the last %v (svidsPerPod); the next in %v", holderName(e), p.most, min(life, paceWithin), wait).After(wait)
	}
	if !known {
		shard.makeRoom()
	}
	shard.by[key] = places{taken + 1, at}
	return func() { shard.giveBack(key) }, nil
}

// left is what is taken of the places now, where each comes back in its time.
func (s places) left(now, each time.Duration) float64 {
	return max(0, s.taken-float64(now-s.at)/float64(max(1, each)))
}

func (s *paceShard) giveBack(key uint64) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if was, ok := s.by[key]; ok {
		was.taken = max(0, was.taken-1)
		s.by[key] = was
	}
}

// makeRoom forgets one of a full shard: of a few that the map's own disorder picks, the one that asked for nothing the longest.
// s.mu is held.
func (s *paceShard) makeRoom() {
	if s.by == nil {
		s.by = make(map[uint64]places)
	}
	if len(s.by) < pacePerShard {
		return
	}
	looked, idlest, since := 0, uint64(0), time.Duration(0)
	for key, x := range s.by {
		if looked == 0 || x.at < since {
			idlest, since = key, x.at
		}
		if looked++; looked == paceLooks {
			break
		}
	}
	delete(s.by, idlest)
}

func (p *Pace) key(e *attestor.Evidence) uint64 {
	var h maphash.Hash
	h.SetSeed(p.seed)
	for _, s := range []string{e.Identity.Cluster(), e.PodUID} {
		_, _ = h.WriteString(s)
		_ = h.WriteByte(0)
	}
	if e.PodUID == "" {
		_, _ = h.WriteString(e.Identity.Namespace())
		_ = h.WriteByte(0)
		_, _ = h.WriteString(e.Identity.ServiceAccount())
	}
	return h.Sum64()
}

func holderName(e *attestor.Evidence) string {
	if e.PodUID == "" {
		return fmt.Sprintf("service account %s/%s", e.Identity.Namespace(), e.Identity.ServiceAccount())
	}
	return fmt.Sprintf("pod %s/%s", e.Identity.Namespace(), e.PodName)
}
