package registration

import (
	"fmt"
	"reflect"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/meshca/meshca/attestor"
)

// whole is a decision of which each field has a value of its own, but those that are not remembered.
func whole(t *testing.T) Decision {
	t.Helper()
	identity, err := attestor.NewIdentity("one", "shop", "web")
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	var fill func(v reflect.Value)
	fill = func(v reflect.Value) {
		for i := range v.NumField() {
			n++
			switch f := v.Field(i).Addr().Interface().(type) {
			case *string:
				*f = fmt.Sprintf("text %d: \x00\xffü", n)
			case *bool:
				*f = true
			case *time.Time:
				*f = time.Unix(int64(n)*1e9, int64(n))
			case *spiffeid.ID:
				*f = spiffeid.RequireFromString(fmt.Sprintf("spiffe://mesh.test/%d", n))
			case *attestor.Identity:
				*f = identity
			case *Caller, *attestor.Evidence:
				fill(v.Field(i))
			case *error, **attestor.Facts: // not remembered
			default:
				t.Fatalf("a field of type %T: is it remembered?", f)
			}
		}
	}
	var d Decision
	fill(reflect.ValueOf(&d).Elem())
	return d
}

func TestADecisionIsRememberedWhole(t *testing.T) {
	full := whole(t)
	early := full
	early.Time, early.Message = time.Unix(-1, 999_999_999), strings.Repeat("long", 1000)
	for _, d := range []Decision{full, early, {}} {
		if got := decode(d.encode(nil)); !reflect.DeepEqual(got, d) {
			t.Errorf("got  %+v\nwant %+v", got, d)
		}
	}
	untrusted := full
	untrusted.Caller.Untrusted, untrusted.Evidence.Facts = fmt.Errorf("no"), &attestor.Facts{}
	if got := decode(untrusted.encode(nil)); !reflect.DeepEqual(got, full) {
		t.Errorf("got  %+v\nwant %+v", got, full)
	}
}

// The newest comes first also where the clock was set back, and whatever kind it is of.
func TestTheRingsOrderIsThatOfDecisions(t *testing.T) {
	r := NewRing(2)
	add := func(serial, outcome string, at int64) {
		d := whole(t)
		d.Evidence.PodName, d.Serial, d.Outcome, d.Time = "web-1", serial, outcome, time.Unix(at, 0)
		r.add(&d)
	}
	add("forgotten", OutcomeIssued, 900)
	add("first", OutcomeIssued, 1000)
	add("refused", "POLICY_DENIED", 50)
	add("last", OutcomeIssued, 60)
	var got []string
	for _, d := range r.ByPod("shop", "web-1", 10) {
		got = append(got, d.Serial)
	}
	if want := []string{"last", "refused", "first"}; !reflect.DeepEqual(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if since := r.Since(); since.Unix() != 1000 {
		t.Errorf("since %v", since)
	}
	if one := r.ByPod("shop", "web-1", 1); len(one) != 1 || one[0].Serial != "last" {
		t.Errorf("the newest: %+v", one)
	}
}

// The Ring is written for each SVID, and its places are taken again and again.
func TestARingThatIsFullTakesNoMoreMemory(t *testing.T) {
	r, d := NewRing(8), whole(t)
	for range 8 {
		r.add(&d)
	}
	if n := testing.AllocsPerRun(100, func() { r.add(&d) }); n != 0 {
		t.Errorf("%v allocations a decision", n)
	}
	long := d
	long.Message = strings.Repeat("x", 8<<10)
	for range 8 {
		r.add(&long)
	}
	for range 8 {
		r.add(&d)
	}
	for _, s := range r.kinds[1].slots {
		if cap(s.decided) > 1<<10 {
			t.Fatalf("a place holds %d bytes for %d", cap(s.decided), len(s.decided))
		}
	}
}

// Who asks is answered from what there was as he came, in pieces: who issues meanwhile waits for none of it but one.
func TestTheRingIsSearchedWhileDecisionsAreMade(t *testing.T) {
	const size, later = 5 * looked, 2 * looked
	r := NewRing(size)
	add := func(from, to int) {
		for i := from; i < to; i++ {
			d := whole(t)
			d.Outcome, d.Evidence.PodName, d.Serial = OutcomeIssued, "web-1", strconv.Itoa(i)
			r.add(&d)
		}
	}
	add(0, 2*size)
	var began sync.Once
	added, calls := make(chan struct{}), 0
	r.look(&r.kinds[0], func(s *slot) bool {
		began.Do(func() {
			go func() {
				defer close(added)
				add(2*size, 2*size+later)
			}()
		})
		calls++ // the lock is free after some of them, and the others come in between, or at the end
		d := decode(s.decided)
		if want := strconv.Itoa(2*size - calls); d.Serial != want {
			t.Errorf("%s, want %s", d.Serial, want)
		}
		return true
	})
	<-added
	if calls > size || calls < looked {
		t.Errorf("%d were looked at, of %d", calls, size)
	}
	all := r.ByPod("shop", "web-1", 2*size)
	for i, d := range all {
		if want := strconv.Itoa(2*size + later - 1 - i); d.Serial != want {
			t.Fatalf("%s, want %s", d.Serial, want)
		}
	}
	if len(all) != size {
		t.Errorf("%d are remembered, want %d", len(all), size)
	}
}
