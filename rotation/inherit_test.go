package rotation

import (
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/meshca/meshca/api/refusal"
)

// What stood knows of taints that the journal of a backup does not: none of those that are tainted signs, and those that
// nobody has to follow leave the set.
func TestInherit(t *testing.T) {
	now := time.Unix(1000, 0)
	third := Party{ID: "third"}
	tainted := func(ids ...string) (r Rollout) {
		for _, id := range ids {
			r.Taints = append(r.Taints, Taint{ID: id, At: now, By: "op"})
		}
		return r
	}
	over := Rollout{Old: third, New: oldRoot, Step: StepOut, NewShare: 100}
	rolling := Rollout{Old: oldRoot, New: newRoot, Step: StepPublished, Entered: now}
	for name, tt := range map[string]struct {
		backup, stood Rollout
		barred        []string
		behind        []string
	}{
		"nothing":                     {over, Rollout{}, nil, nil},
		"the one that signs":          {over, tainted("old"), []string{"old"}, nil},
		"one that signs for nobody":   {over, tainted("other"), []string{"other"}, []string{"other"}},
		"one that went":               {over, tainted("third"), []string{"third"}, []string{"third"}},
		"an emergency's of old":       {over, Rollout{Old: oldRoot, New: newRoot, Step: StepOut, Within: time.Hour, Begun: now}, []string{"old"}, nil},
		"the one that is rolled out":  {rolling, tainted("new"), []string{"new"}, nil},
		"the one that is replaced":    {rolling, tainted("old"), []string{"old"}, nil},
		"one that the backup knew of": {tainted("other"), tainted("other"), []string{"other"}, nil},
	} {
		stood := tt.stood
		stood.Gone = []string{"gone"}
		r := tt.backup.Inherit(stood, now)
		for _, id := range []string{"old", "new", "third", "other"} {
			if err := r.Barred(id); (err != nil) != slices.Contains(tt.barred, id) || err != nil && refusal.Of(err) != refusal.RootTainted {
				t.Errorf("%s: %s: %v", name, id, err)
			}
		}
		var behind []string
		for _, b := range r.Behind {
			if behind = append(behind, b.ID); b.By.After(now) {
				t.Errorf("%s: %s leaves at %s", name, b.ID, b.By)
			}
		}
		if !slices.Equal(behind, tt.behind) || !slices.Contains(r.Gone, "gone") {
			t.Errorf("%s: behind are %q, gone %q", name, behind, r.Gone)
		}
	}
	if len(over.Taints)+len(over.Behind) > 0 {
		t.Error("the backup's own was changed")
	}
}

// A restored rollout to a root that is tainted goes to the other one; where that is tainted, too, it stands still, nothing is
// signed, and an order with a third one leads out.
func TestARolloutToATaintedOne(t *testing.T) {
	now := time.Now()
	record := func(step Step, share int, aborted bool) Rollout {
		return Rollout{Old: oldRoot, New: newRoot, Step: step, NewShare: share, Aborted: aborted, Entered: now, Begun: now, Canary: 5}
	}
	for _, c := range []struct {
		from    Rollout
		tainted Party
		stays   Party
	}{
		{record(StepChosen, 0, false), newRoot, oldRoot},
		{record(StepPublished, 0, false), newRoot, oldRoot},
		{record(StepConfirmed, 0, false), newRoot, oldRoot},
		{record(StepCanary, 5, false), newRoot, oldRoot},
		{record(StepSigning, 100, false), newRoot, oldRoot},
		{record(StepRetired, 100, false), newRoot, oldRoot},
		{record(StepConfirmed, 5, true), oldRoot, newRoot},
		{record(StepSigning, 0, true), oldRoot, newRoot},
		{record(StepRetired, 0, true), oldRoot, newRoot},
	} {
		p := &plain{record: c.from.Inherit(Rollout{Taints: []Taint{{ID: c.tainted.ID, By: "op"}}, Gone: []string{c.tainted.ID}}, now)}
		x := NewRoller(RollerOptions{Journal: p, Authorities: p})
		for x.Move(t.Context()) {
		}
		r := p.record
		if says := says(c.from); r.Step != StepOut || r.Stays() != c.stays || !r.Signs(c.stays.ID) || r.Signs(c.tainted.ID) || !slices.Contains(p.did, "withdraw "+c.tainted.ID) {
			t.Errorf("%s, %s is tainted: it is %+v, and did %q", says, c.tainted.ID, r, p.did)
		}
		both := c.from.Inherit(Rollout{Taints: []Taint{{ID: "old"}, {ID: "new"}}}, now)
		p = &plain{record: both}
		x = NewRoller(RollerOptions{Journal: p, Authorities: p})
		for x.Move(t.Context()) {
		}
		if s, _ := x.Standing(); p.record.Step != c.from.Step || refusal.Of(s.Err) != refusal.RootTainted || both.Barred(both.Signer().ID) == nil {
			t.Errorf("%s, both are tainted: it is %s, %v; %v", says(c.from), says(p.record), s.Err, both.Barred(both.Signer().ID))
		}
		third := Emergency{By: "op", Within: time.Hour, First: both.Signer(), Successor: thirdRoot}
		if _, err := x.Change(t.Context(), func(r Rollout) (Rollout, error) { return r.Taint(both.Signer(), third, now) }); err != nil {
			t.Errorf("%s, both are tainted: %v", says(c.from), err)
		}
	}
	r := Rollout{Old: oldRoot, New: newRoot, Step: StepPublished, Within: time.Hour, Begun: now}
	if err := r.Barred(oldRoot.ID); err != nil {
		t.Errorf("in an emergency: %v", err)
	}
	if r.Taints = append(r.taints(), Taint{ID: "new"}); r.Barred(oldRoot.ID) == nil {
		t.Error("it signs in an emergency that brings in nobody")
	}
}

// A restored rollout away from a root that is tainted waits for nobody before another one signs: nobody could confirm that to a
// CA without a certificate. One that had left the set before is taken out of it before anybody hears of that, in each step in
// which another one is there, and nothing that lives under it is waited for.
func TestARolloutAwayFromATaintedOne(t *testing.T) {
	now := time.Now()
	for _, from := range []Rollout{
		{Step: StepChosen}, {Step: StepPublished}, {Step: StepConfirmed}, {Step: StepCanary, NewShare: 5}, {Step: StepSigning, NewShare: 100},
		{Step: StepRetired, NewShare: 100}, {Step: StepLeaving, NewShare: 100},
		{Step: StepConfirmed, NewShare: 5, Aborted: true}, {Step: StepSigning, Aborted: true}, {Step: StepRetired, Aborted: true},
	} {
		from.Old, from.New, from.Entered, from.Begun, from.Canary, from.LastEnd = oldRoot, newRoot, now, now, 5, now.Add(6*time.Hour)
		for _, left := range []bool{true, false} {
			later := Rollout{Taints: []Taint{{ID: "old", By: "op"}}}
			if left {
				later.Gone = []string{"old"}
			}
			p := &plain{lastEnd: 6 * time.Hour, unconfirmed: []string{"agent"}, record: from.Inherit(later, now)}
			if (p.record.Returned(Party{ID: "old"}) != nil) != left || p.record.Returned(Party{ID: "new"}) != nil {
				t.Errorf("%s: who returned is not known", says(from))
			}
			if heir, leads := p.record.Heir(); heir != newRoot || !leads {
				t.Errorf("%s: nobody knows who signs instead: %s", says(from), heir.ID)
			}
			x := NewRoller(RollerOptions{Journal: p, Authorities: p})
			for x.Move(t.Context()) {
			}
			r := p.record
			if out := r.Step == StepOut; r.Signer() != newRoot || out != (left || from.Step == StepLeaving) || !out && r.Step != StepRetired {
				t.Errorf("%s, it had left: %v: it is %s, and did %q", says(from), left, says(r), p.did)
			}
			if first := slices.Index(p.did, "withdraw old"); left && (first < 0 || from.Step != StepChosen && !from.Aborted && first != 0) {
				t.Errorf("%s: it did %q", says(from), p.did)
			}
		}
	}
}

// Nobody is brought in by itself where there is no other one, or that one is tainted, or leaving.
func TestNoHeir(t *testing.T) {
	both := Rollout{Taints: []Taint{{ID: "old"}, {ID: "new"}}}
	for _, r := range []Rollout{
		{New: oldRoot, Step: StepOut, NewShare: 100, Taints: []Taint{{ID: "old"}}},
		{Old: oldRoot, New: newRoot, Step: StepPublished, Taints: both.Taints},
		{Old: oldRoot, New: newRoot, Step: StepLeaving, NewShare: 100, Taints: []Taint{{ID: "new"}}},
	} {
		if heir, leads := r.Heir(); leads {
			t.Errorf("%s: %s follows", says(r), heir.ID)
		}
	}
}

// A backup of before a root was replaced in the ordinary way brings it back to sign. Its key is stolen later: that is an
// emergency like any other, the root signs until the successor may, and leaves when what it signed has been renewed.
func TestAnEmergencyAfterARootCameBack(t *testing.T) {
	now := time.Now()
	key := func(p Party) Party { p.Key = "a key"; return p }
	old := key(oldRoot)
	twin := Party{ID: "twin", Key: old.Key}
	later := Rollout{Old: old, New: newRoot, Step: StepOut, NewShare: 100, Gone: []string{"other", old.ID, twin.ID}}
	for _, backup := range []Rollout{
		{New: old, Step: StepOut, NewShare: 100},
		{Old: old, New: thirdRoot, Step: StepPublished, Entered: now, Begun: now},
	} {
		for _, stolen := range []Party{old, twin} {
			p := &plain{record: backup.Inherit(later, now), unconfirmed: []string{"agent"}, lastEnd: 6 * time.Hour}
			at := now.Add(48 * time.Hour)
			x := NewRoller(RollerOptions{Journal: p, Authorities: p, Now: func() time.Time { return at }})
			e := Emergency{By: "op", Within: time.Hour, First: old, Successor: thirdRoot, Twins: []Party{old}}
			if stolen == old {
				e.Twins = []Party{twin}
			}
			if _, err := x.Change(t.Context(), func(r Rollout) (Rollout, error) { return r.Taint(stolen, e, at) }); err != nil {
				t.Fatal(err)
			}
			for x.Move(t.Context()) {
			}
			for _, root := range []Party{old, twin} {
				if err := p.record.Returned(root); err != nil && !slices.Contains(p.did, "withdraw "+root.ID) {
					t.Errorf("%s, %s is tainted: nobody may be told of %s: %v", says(backup), stolen.ID, root.ID, err)
				}
			}
			if err := p.record.Barred(old.ID); err != nil || p.record.Step != StepPublished || slices.Contains(p.did, "withdraw old") || !slices.Contains(p.record.Gone, "other") {
				t.Errorf("%s, %s is tainted: it is %s, and did %q: %v", says(backup), stolen.ID, says(p.record), p.did, err)
			}
		}
	}
	// Backups of the restored store do not make it one that had left either.
	for _, left := range []bool{false, true} {
		backup := Rollout{New: old, Step: StepOut, NewShare: 100}.Inherit(later, now)
		stood := Rollout{Old: old, New: thirdRoot, Step: StepPublished, Within: time.Hour, Taints: []Taint{{ID: old.ID, Key: old.Key}}}
		if left {
			stood.Gone = []string{old.ID}
		}
		if r := backup.Inherit(stood, now); (r.Returned(old) != nil) != left {
			t.Errorf("it was tainted since, and had left: %v: %v", left, r.Returned(old))
		}
	}
	// Of one that was tainted before it came back, another order changes nothing: nobody is told of it.
	later.Taints = []Taint{{ID: old.ID, Key: old.Key}}
	r, err := Rollout{New: old, Step: StepOut, NewShare: 100}.Inherit(later, now).Taint(old, Emergency{Within: time.Hour, First: old, Successor: thirdRoot}, now)
	if err != nil || r.Returned(old) == nil || r.Returned(twin) == nil || r.Barred(old.ID) == nil {
		t.Errorf("%+v, %v", r, err)
	}
}

// The set changes before the journal says so: what was just about to leave by the one that stood had left. It is not waited for
// where it leaves behind a rollout, either.
func TestWhatMayHaveLeftHasLeft(t *testing.T) {
	now := time.Now()
	tainted := []Taint{{ID: "old", By: "op"}}
	backup := Rollout{Old: oldRoot, New: newRoot, Step: StepRetired, NewShare: 100, LastEnd: now.Add(6 * time.Hour)}
	for _, c := range []struct {
		stood Rollout
		left  bool
	}{
		{Rollout{Old: oldRoot, New: newRoot, Step: StepRetired, NewShare: 100, Taints: tainted}, false},
		{Rollout{Old: oldRoot, New: newRoot, Step: StepLeaving, NewShare: 100, Taints: tainted}, true},
		{Rollout{Taints: tainted, Behind: []Behind{{Party: oldRoot, By: now.Add(time.Second)}}}, false},
		{Rollout{Taints: tainted, Behind: []Behind{{Party: oldRoot, By: now}}}, true},
	} {
		if r := backup.Inherit(c.stood, now); (r.Returned(oldRoot) != nil) != c.left {
			t.Errorf("%s: %v", says(c.stood), r.Returned(oldRoot))
		}
	}
	p := &plain{record: Rollout{New: newRoot, Step: StepOut, NewShare: 100, Taints: tainted, Gone: []string{"old"}, Behind: []Behind{{Party: oldRoot, By: now.Add(time.Hour)}}}}
	if x := NewRoller(RollerOptions{Journal: p, Authorities: p}); !x.Move(t.Context()) || len(p.record.Behind) > 0 || !slices.Contains(p.did, "withdraw old") {
		t.Errorf("it did %q, and is %s", p.did, says(p.record))
	}
}

// One that has retired by a journal that was put back may have signed since: it stays for as long as that can live.
func TestARetiredOneThatWasPutBack(t *testing.T) {
	now := time.Unix(1000, 0)
	for _, c := range []struct {
		step       Step
		until, end time.Duration
	}{
		{StepRetired, 6 * time.Hour, 6 * time.Hour}, {StepRetired, time.Minute, time.Hour}, {StepSigning, 6 * time.Hour, time.Hour}, {StepOut, 6 * time.Hour, time.Hour},
	} {
		r := Rollout{Old: oldRoot, New: newRoot, Step: c.step, NewShare: 100, LastEnd: now.Add(time.Hour)}
		if end := r.PutBack(now.Add(c.until), now).LastEnd.Sub(now); end != c.end {
			t.Errorf("%s, until %s: %s", c.step, c.until, end)
		}
	}
}

// What the set that stood has, and the backup's has not, is kept for as long as what it signed can live; nothing is decided
// by that.
func TestWhatIsKept(t *testing.T) {
	now := time.Unix(1000, 0)
	until, tainted := now.Add(6*time.Hour), Party{ID: "tainted"}
	over := Rollout{New: oldRoot, Step: StepOut, NewShare: 100, Gone: []string{"new"}, Taints: []Taint{{ID: "tainted"}, {ID: "third"}}}
	r, come := over.Keep([]Party{oldRoot, thirdRoot}, []Party{oldRoot, newRoot, tainted}, until)
	if !slices.Equal(come, []Party{newRoot}) || len(r.Behind) != 1 || r.Behind[0] != (Behind{Party: newRoot, By: until, Kept: true}) || r.Leaves("new") {
		t.Fatalf("%v come, and it is %+v", come, r)
	}
	if r.Returned(thirdRoot) == nil {
		t.Error("what is tainted, and is not in the set that stood, had left it")
	}
	if r = r.PutBack(until.Add(time.Minute), now); !r.Behind[0].By.Equal(until.Add(time.Minute)) {
		t.Errorf("put back again, it leaves at %s", r.Behind[0].By)
	}
	if stays := r.Stay("new"); len(stays.Behind) != 0 || len(r.Stay("another").Behind) != 1 {
		t.Errorf("somebody wants it, and it is %+v", stays)
	}
	// Somebody goes to it: it is a party from then on. What it signed before is renewed where it is tainted then.
	to, err := Begin(r, oldRoot, newRoot, BeginOptions{}, now)
	if err != nil || len(to.Behind) != 0 {
		t.Fatalf("%+v, %v", to, err)
	}
	e := Emergency{By: "op", Within: time.Hour, First: oldRoot, Successor: Party{ID: "fourth"}}
	if to, err = to.Taint(newRoot, e, now); err != nil || to.Step != StepSigning || to.Stays() != oldRoot {
		t.Errorf("%s, %v", says(to), err)
	}
	// Tainted where it is, it leaves within the bound.
	if r, err = r.Taint(newRoot, e, now); err != nil || r.Behind[0].Kept || !r.Behind[0].By.Equal(now.Add(time.Hour)) {
		t.Errorf("%+v, %v", r, err)
	}
	// One that was leaving by the backup, and is trusted, leaves later.
	leaving := Rollout{Old: oldRoot, New: newRoot, Step: StepLeaving, NewShare: 100}
	leaving, _ = leaving.Keep([]Party{newRoot}, []Party{oldRoot, newRoot}, until)
	if leaving = leaving.PutBack(until, now); leaving.Step != StepOut || len(leaving.Behind) != 1 || leaving.Behind[0].ID != "old" || !leaving.Behind[0].By.Equal(until) {
		t.Errorf("%+v", leaving)
	}
}

// A renewal that is owed outlives rollouts and restores, and is one for each authority.
func TestWhatIsOwed(t *testing.T) {
	at := time.Unix(1000, 0)
	first, second := Owed{ID: "old", Signer: "1", At: at, Within: time.Minute}, Owed{ID: "old", Signer: "2", At: at, Within: time.Minute}
	r := Rollout{}.Owe(first).Owe(second).Owe(Owed{ID: "new"})
	next, err := Begin(r, oldRoot, newRoot, BeginOptions{}, at)
	if err != nil || !slices.Equal(next.Owed, []Owed{second, {ID: "new"}}) || !slices.Equal(Rollout{}.Inherit(next, at).Owed, next.Owed) {
		t.Errorf("%+v, %v", next.Owed, err)
	}
	if r = next.Settled([]Owed{first, second}); !slices.Equal(r.Owed, []Owed{{ID: "new"}}) {
		t.Errorf("%+v", r.Owed)
	}
}

// What stood knows a tainted key by another authority than the backup: neither signs, is gone to, or gone back to.
func TestInheritedKeys(t *testing.T) {
	now := time.Unix(1000, 0)
	keyed := func(p Party) Party { p.Key = "key of " + p.ID; return p }
	old, next := keyed(oldRoot), keyed(newRoot)
	taint := func(p Party) Rollout { return Rollout{Taints: []Taint{{ID: "another", Key: p.Key, At: now, By: "op"}}} }
	over := Rollout{Old: keyed(thirdRoot), New: old, Step: StepOut, NewShare: 100}.Inherit(taint(old), now)
	if err := over.Barred(old.ID); over.Barred("third") != nil || err == nil || !strings.Contains(err.Error(), "the root another was tainted") ||
		!strings.Contains(err.Error(), "the root old has its key, and nothing is signed under it") {
		t.Errorf("it may sign: %v, %v", err, over.Barred("third"))
	}
	if _, err := Begin(over, old, Party{ID: "prolonged", Key: old.Key}, BeginOptions{}, now); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("a rollout to another one of the key: %v", err)
	}
	rolling := Rollout{Old: old, New: next, Step: StepPublished, Entered: now}
	if _, err := rolling.Inherit(taint(old), now).Abort("op", now); refusal.Of(err) != refusal.RootTainted {
		t.Errorf("it goes back: %v", err)
	}
	p := &plain{record: rolling.Inherit(taint(next), now)}
	x := NewRoller(RollerOptions{Journal: p, Authorities: p})
	for x.Move(t.Context()) {
	}
	if p.record.Step != StepOut || p.record.Signer() != old {
		t.Errorf("it goes on to %s", says(p.record))
	}
}

// A journal of before keys were named learns those that are known, and keeps what it names.
func TestAJournalLearnsKeys(t *testing.T) {
	r := Rollout{
		Old: oldRoot, New: Party{ID: "new", Key: "named"}, Step: StepPublished,
		Taints: []Taint{{ID: "third"}, {ID: "lost"}}, Behind: []Behind{{Party: thirdRoot}},
	}
	got := r.Keyed(func(id string) string {
		if id == "lost" {
			return ""
		}
		return "key of " + id
	})
	if got.Old.Key != "key of old" || got.New.Key != "named" || got.Taints[0].Key != "key of third" || got.Taints[1].Key != "" || got.Behind[0].Key != "key of third" {
		t.Errorf("got %+v", got)
	}
	if r.Taints[0].Key != "" || r.Behind[0].Key != "" {
		t.Error("the record itself was changed")
	}
	if _, tainted := got.TaintedKey("key of third"); !tainted {
		t.Error("the key is not tainted")
	}
	// A taint that came without a key gets it with the next order.
	again, err := Rollout{Taints: []Taint{{ID: "third", By: "first"}}}.Taint(Party{ID: "third", Key: "k"}, Emergency{By: "op", Within: time.Hour}, time.Unix(1000, 0))
	if taint, tainted := again.TaintedKey("k"); err != nil || !tainted || taint.By != "first" || len(again.Taints) != 1 {
		t.Errorf("%+v, %v", again.Taints, err)
	}
}
