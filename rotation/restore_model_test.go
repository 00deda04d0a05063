package rotation

import (
	"slices"
	"testing"
	"time"

	"pgregory.net/rapid"
)

// TestNobodyMeetsWhatABackupBringsBack is the same with operators who take backups and put them back, at any moment and over
// any store: what had been tainted and had left is told to nobody again, the CA never waits, without an end, for those who
// could not reach it, and what signed since keeps its place for as long as what it signed lives.
func TestNobodyMeetsWhatABackupBringsBack(t *testing.T) {
	for _, share := range []int{1, 2} {
		for range 30 {
			rapid.Check(t, func(t *rapid.T) { rollAbout(t, share, true) })
		}
	}
}

// unrecorded is the longest life of a certificate here.
const unrecorded = 360 * time.Minute

// kept is a backup.
type kept struct {
	record Rollout
	set    []string
}

// signer is who signs by the journal.
func (m *mesh) signer() Party {
	if m.record.Step == "" {
		return Party{ID: "root0", Key: "key0"}
	}
	return m.record.Signer()
}

// putBack restores the backup over the store there is, as it would be done while no process runs.
func (m *mesh) putBack(party func(id string) Party) {
	clear(m.wanted) // of the standing set, which others decide about
	for id := range m.taints {
		if !slices.Contains(m.trusted(), id) {
			m.left[id] = true
		}
	}
	b := *m.backup
	parties := func(ids []string) (all []Party) {
		for _, id := range ids {
			all = append(all, party(id))
		}
		return all
	}
	set, until := slices.Clone(b.set), m.now.Add(unrecorded)
	r, come := b.record.Inherit(m.record, m.now).Keep(parties(b.set), parties(m.trusted()), until)
	for _, p := range come {
		set = append(set, p.ID)
	}
	r = r.PutBack(until, m.now)
	for _, id := range set { // as at a start
		if _, tainted := r.tainted(party(id)); tainted {
			r = r.Expel(party(id), m.now)
		}
	}
	m.record, m.version = r, m.version+1
	m.sets = append(m.sets, set)
	m.floor = uint64(len(m.sets)) // what agents have seen of sets that are lost confirms nothing
	for _, a := range m.agents {
		if until.After(a.holds) {
			a.holds = until
		}
	}
	// Which agents trust the roots that the backup knows is lost.
	for _, id := range b.set {
		if waits := r.Step == StepChosen || r.Step == StepPublished; !waits || id != r.Stays().ID {
			m.may[id] = m.now
		}
	}
	m.excuse()
}

// excuse has a root sign that nobody could confirm, for nothing is signed meanwhile.
func (m *mesh) excuse() {
	if r := m.record; (r.Step == StepChosen || r.Step == StepPublished) && r.Barred(m.signer().ID) != nil {
		m.may[r.Stays().ID] = m.now
	}
}

// told reports whether agents are told of the trusted set.
func (m *mesh) told(party func(id string) Party) bool {
	return m.record.Barred(m.signer().ID) == nil &&
		!slices.ContainsFunc(m.trusted(), func(id string) bool { return m.record.Returned(party(id)) != nil })
}

// restored wants what a restored CA does by itself: it signs, and tells what it trusts, or it takes an order to do so.
func (m *mesh) restored(t *rapid.T, x *Roller, party func(id string) Party) {
	for x.Move(t.Context()) {
	}
	barred := m.record.Barred(m.signer().ID)
	if _, leads := m.record.Heir(); barred != nil && leads {
		t.Fatalf("nothing is signed (%v), and it stands: %+v", barred, x.standing.Value())
	}
	if barred == nil && !m.told(party) {
		t.Fatalf("nobody is told of %v: %+v", m.trusted(), x.standing.Value())
	}
}
