package registration

import (
	"context"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/attestor"
	"github.com/meshca/meshca/ca"
)

// AgentStream is the Sync stream of one instance of an agent. Its methods are safe for concurrent use.
//
// What it acknowledged counts beyond its end, and that of the CA's process: a stream is opened anew at each change of the
// trust bundle, and the proxies below the instance have what they have meanwhile. It counts until the instance is back, or
// certainly no more: its pod is gone, or its last SVID has ended.
type AgentStream struct {
	book *AgentBook
	id   string
	// from tells instances apart: the pod, or the SVID where there is none.
	from string
	// What book.mu guards:
	acked  uint64
	before uint64   // what the instance had acknowledged when the stream began
	lack   []string // who below it lacks the newest bundle, as it said last
	ended  bool
	// away is since when it has ended, with a monotonic reading: at the latest, since this process began.
	away time.Time
}

// counts reports whether what the stream acknowledged matters at this moment; at the zero time, it does for as long as an
// SVID of its pod's is on record, of which there are few. Of an instance without a pod nobody can tell that it is back.
func (s *agentState) counts(x *AgentStream, at time.Time) bool {
	return !x.ended || slices.ContainsFunc(s.record.Instances, func(i ca.AgentInstance) bool {
		return x.from == i.PodUID && (at.IsZero() || at.Before(i.NotAfter) && at.Before(inUse(x.away, at)))
	})
}

// recall has the instances on record count that had streams with an earlier process, or may have had: as ones that are away
// and have what all of them had.
func (s *agentState) recall(b *AgentBook) {
	s.streams, s.heard = map[*AgentStream]struct{}{}, time.Now()
	known := map[string]bool{"": true}
	for _, i := range s.record.Instances {
		if !known[i.PodUID] {
			known[i.PodUID] = true
			s.streams[&AgentStream{book: b, id: s.record.ID, from: i.PodUID, acked: s.record.AckedSequence, ended: true, away: s.heard}] = struct{}{}
		}
	}
}

// acked is the sequence that all instances that count have acknowledged; with none, the last such.
func (s *agentState) acked(at time.Time) uint64 {
	least := uint64(math.MaxUint64)
	for x := range s.streams {
		if s.counts(x, at) {
			least = min(least, x.acked)
		}
	}
	if least == math.MaxUint64 {
		return s.record.AckedSequence
	}
	return least
}

func (s *agentState) lack(at time.Time) (all []string) {
	for x := range s.streams {
		if s.counts(x, at) {
			all = append(all, x.lack...)
		}
	}
	slices.Sort(all)
	return all
}

func (s *agentState) connected() bool {
	for x := range s.streams {
		if !x.ended {
			return true
		}
	}
	return false
}

// Connected notes an open Sync stream of the agent with the SVID of this serial, until that is closed. A stream that the same
// instance had before is not waited for: it has ended, or is a connection that nobody has found dead yet.
func (b *AgentBook) Connected(id spiffeid.ID, serial, version string) *AgentStream {
	x := &AgentStream{book: b, id: id.String(), from: serial}
	b.note(x.id, func(s *agentState) {
		for _, i := range s.record.Instances {
			if i.Serial == serial && i.PodUID != "" {
				x.from = i.PodUID
			}
		}
		for y := range s.streams {
			if y.from == x.from {
				x.before = max(y.before, y.acked)
			}
		}
		maps.DeleteFunc(s.streams, func(y *AgentStream, _ struct{}) bool { return y.from == x.from || !s.counts(y, time.Time{}) })
		if len(s.streams) == 0 {
			s.streams, x.before = map[*AgentStream]struct{}{}, s.record.AckedSequence
		}
		s.streams[x] = struct{}{}
		s.hear()
		if version != "" {
			s.record.Version = version
		}
	})
	return x
}

// Acknowledge notes that every open stream below this instance has the bundle of this sequence, and who lacks a newer one.
func (x *AgentStream) Acknowledge(sequence uint64, lack []string) {
	x.book.note(x.id, func(s *agentState) {
		x.acked, x.lack = max(x.acked, sequence), lack
		s.hear()
		if _, last := s.streams[x]; last { // what was replaced says nothing any more
			s.record.AckedSequence = s.acked(s.record.LastSeen)
		}
	})
}

// Close notes that the stream has ended.
func (x *AgentStream) Close() {
	x.book.note(x.id, func(s *agentState) {
		s.hear()
		x.ended, x.away, x.acked = true, s.heard, max(x.acked, x.before)
		s.record.AckedSequence = s.acked(s.record.LastSeen)
	})
}

// away are the instances in a cluster whose streams have ended and which count still.
func (b *AgentBook) away(cluster string) (streams []*AgentStream, evidence []*attestor.Evidence) {
	b.mu.RLock()
	defer b.mu.RUnlock()
	for _, s := range b.byID {
		for x := range s.streams {
			if s.record.Cluster != cluster || !x.ended {
				continue
			}
			for _, i := range s.record.Instances {
				if x.from != i.PodUID {
					continue
				}
				if known, err := known(cluster, i); err == nil {
					streams, evidence = append(streams, x), append(evidence, &known.evidence)
				}
				break
			}
		}
	}
	return streams, evidence
}

// bury forgets instances whose pods are gone: nobody is below them, or ever will be.
func (a *Authority) bury(ctx context.Context, cluster string, member Member) {
	streams, evidence := a.Agents.away(cluster)
	if len(streams) == 0 {
		return
	}
	for i := range member.Cluster.Ended(ctx, evidence) {
		a.Agents.note(streams[i].id, func(s *agentState) {
			if streams[i].ended {
				delete(s.streams, streams[i])
				s.record.AckedSequence = s.acked(time.Now())
			}
		})
	}
}
