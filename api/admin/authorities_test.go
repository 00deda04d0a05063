package admin

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"math/big"
	"os"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/types/known/durationpb"

	meshcav1 "github.com/meshca/meshca/api/meshca/v1"
	"github.com/meshca/meshca/api/refusal"
	"github.com/meshca/meshca/ca"
	"github.com/meshca/meshca/ca/registration"
	"github.com/meshca/meshca/ca/rollout"
	"github.com/meshca/meshca/rotation"
)

// operator is what stands behind the door: what it is told is kept.
type operator struct {
	view   rollout.View
	told   []string
	plans  []rollout.IntermediatePlan
	broken error
}

func (o *operator) View(context.Context) (rollout.View, error) { return o.view, o.broken }

func (o *operator) Standing() rotation.Standing { return o.view.Standing }

func (o *operator) Repoint(_ context.Context, issuer string, dryRun bool) (ca.Root, bool, error) {
	o.told = append(o.told, fmt.Sprintf("repoint to %s, dry run %v", issuer, dryRun))
	return ca.Root{ID: "the root", Ref: issuer}, issuer == "again", o.broken
}

func (o *operator) TrustRoots(_ context.Context, roots []*x509.Certificate) ([]string, error) {
	o.told = append(o.told, fmt.Sprintf("trust %d roots", len(roots)))
	return []string{ca.RootID(roots[0])}, o.broken
}

func (o *operator) PlanIntermediates(context.Context) []rollout.IntermediatePlan { return o.plans }

func (o *operator) RemoveRoot(_ context.Context, id string) error {
	o.told = append(o.told, "remove "+id)
	return o.broken
}

func (o *operator) Rotate(_ context.Context, r rollout.RotateOptions) (rotation.Rollout, error) {
	o.told = append(o.told, fmt.Sprintf("rotate %+v", r))
	return rotation.Rollout{Old: rotation.Party{ID: "old"}, New: rotation.Party{ID: "new", Ref: "r2"}, Step: rotation.StepChosen, Canary: r.Canary, Within: r.Within}, o.broken
}

func (o *operator) Continue(_ context.Context, despite []string) (rotation.Rollout, error) {
	o.told = append(o.told, fmt.Sprintf("continue %q", despite))
	return rotation.Rollout{Step: rotation.StepSigning}, o.broken
}

func (o *operator) Abort(_ context.Context, by string) (rotation.Rollout, error) {
	o.told = append(o.told, "abort "+by)
	return rotation.Rollout{Step: rotation.StepRetired, Aborted: true}, o.broken
}

func (o *operator) RotateIntermediate(_ context.Context, tainted time.Duration) (time.Time, error) {
	o.told = append(o.told, fmt.Sprint("intermediate ", tainted))
	return time.Unix(1000, 0), o.broken
}

func TestAuthoritiesAreShown(t *testing.T) {
	f := start(t, "rules: []")
	soon := time.Now().Add(time.Hour)
	f.agents = []registration.AgentView{
		{AgentRecord: ca.AgentRecord{ID: "spiffe://mesh.example/a", AckedSequence: 3, HoldsUntil: soon}, Connected: true, Rejections: []string{"/run/x: bad"}},
		{AgentRecord: ca.AgentRecord{ID: "spiffe://mesh.example/own", Instances: []ca.AgentInstance{{NotAfter: soon}}}},
		{AgentRecord: ca.AgentRecord{ID: "spiffe://mesh.example/gone", HoldsUntil: time.Now()}},
	}
	f.operator.view = rollout.View{
		Candidates:  []ca.UpstreamIssuer{{Ref: "r3", Name: "third", Fault: errors.New("no key")}},
		LeftOut:     9,
		UpstreamErr: errors.New("sealed"),
		Readers:     []rollout.ReaderView{{Reader: rollout.Reader{Name: "configmap", Refresh: time.Minute}, Until: soon}},
		Standing: rotation.Standing{
			Rollout: rotation.Rollout{Old: rotation.Party{ID: "a"}, Step: rotation.StepPublished, Set: 4, Within: time.Minute}, Waits: []string{"spiffe://mesh.example/own"}, Until: soon, Err: errors.New("away"),
		},
	}
	got, err := f.Authorities.GetAuthorities(t.Context(), &meshcav1.GetAuthoritiesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if a := got.GetAgents(); len(a) != 2 || a[0].GetAckedBundleSequence() != 3 || !a[0].GetConnected() || len(a[0].GetRejections()) != 1 || a[1].GetCountsUntil() == nil {
		t.Errorf("agents %v", a)
	}
	r := got.GetRollout()
	if !r.GetActive() || r.GetStep() != "published" || r.GetBundleSequence() != 4 || len(r.GetWaits()) != 1 || r.GetError() != "away" || r.GetUntil() == nil || r.GetWithin().AsDuration() != time.Minute {
		t.Errorf("rollout %v", r)
	}
	if x := got.GetReaders(); len(x) != 1 || x[0].GetName() != "configmap" || x[0].GetRefresh().AsDuration() != time.Minute || !x[0].GetUntil().AsTime().Equal(soon) {
		t.Errorf("readers %v", x)
	}
	if st, err := f.CA.GetStatus(t.Context(), &meshcav1.GetStatusRequest{}); err != nil || st.GetRollout().GetStep() != "published" || st.GetRollout().GetError() != "away" {
		t.Errorf("status %v, %v", st, err)
	}
	if c := got.GetCandidates(); len(c) != 1 || c[0].GetRef() != "r3" || c[0].GetFault() != "no key" || c[0].GetRoot() != "" || got.GetUpstreamError() != "sealed" || got.GetIssuersLeftOut() != 9 {
		t.Errorf("candidates %v, %q", c, got.GetUpstreamError())
	}
}

// A step that is over is told by what the journal kept of it, and by what can be told of one of which it kept nothing.
func TestPassagesAreShown(t *testing.T) {
	at := time.Unix(1000, 0)
	r := rotation.Rollout{Old: rotation.Party{ID: "a"}, New: rotation.Party{ID: "b"}, Step: rotation.StepOut, Aborted: true, AbortedAt: at.Add(time.Minute), Passed: []rotation.Passage{
		{Step: rotation.StepPublished, Entered: at},
		{Step: rotation.StepSigning, Entered: at.Add(time.Minute)},
		{Step: rotation.StepRetired, Entered: at, Had: &rotation.Had{Aborted: true, AbortedBy: "uid 7", NewShare: 5, Set: 4, Within: time.Minute, GivenUp: true, LastEnd: at, Spared: true}},
		{Step: rotation.StepRetired, Entered: at.Add(time.Minute), Had: &rotation.Had{}},
	}}
	got := encodeRollout(r).GetPassed()
	if len(got) != 4 || got[0].GetAborted() || got[0].GetHad() != nil || !got[1].GetAborted() || got[1].GetHad() != nil || got[3].GetAborted() || got[3].GetHad() == nil || got[3].GetHad().GetWithin() != nil {
		t.Fatalf("got %v", got)
	}
	had := got[2].GetHad()
	if !got[2].GetAborted() || had.GetAbortedBy() != "uid 7" || had.GetNewShare() != 5 || had.GetBundleSequence() != 4 || had.GetWithin().AsDuration() != time.Minute || !had.GetGivenUp() ||
		!had.GetLastEnd().AsTime().Equal(at) || !had.GetSpared() {
		t.Errorf("got %v", had)
	}
}

func TestAuthorityVerbsAreTaken(t *testing.T) {
	f := start(t, "rules: []")
	by := fmt.Sprintf("uid %d", os.Getuid())
	a, ctx := f.Authorities, t.Context()
	rotated, err := a.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: "r2", Share: 5})
	if err != nil || rotated.GetRollout().GetNewRoot() != "new" || !strings.Contains(strings.Join(rotated.GetPlan(), "\n"), "5 % of the identities") {
		t.Errorf("%v, %v", rotated, err)
	}
	tainted, err := a.RotateRoot(ctx, &meshcav1.RotateRootRequest{TaintedWithin: durationpb.New(4 * time.Minute)})
	if err != nil || !strings.Contains(strings.Join(tainted.GetPlan(), "\n"), "after 2m0s those that have not are left behind") {
		t.Errorf("%v, %v", tainted, err)
	}
	if _, err := a.RotateRoot(ctx, &meshcav1.RotateRootRequest{DryRun: true}); err != nil {
		t.Error(err)
	}
	if _, err := a.ContinueRollout(ctx, &meshcav1.ContinueRolloutRequest{Despite: []string{"x"}}); err != nil {
		t.Error(err)
	}
	if r, err := a.AbortRollout(ctx, &meshcav1.AbortRolloutRequest{}); err != nil || !r.GetRollout().GetAborted() {
		t.Errorf("%v, %v", r, err)
	}
	if r, err := a.RotateIntermediate(ctx, &meshcav1.RotateIntermediateRequest{TaintedWithin: durationpb.New(time.Minute)}); err != nil || r.GetTrustedUntil().AsTime().Unix() != 1000 {
		t.Errorf("%v, %v", r, err)
	}
	want := []string{
		"rotate {By:" + by + " Issuer:r2 Canary:5 Within:0s Tainted: DryRun:false}", "rotate {By:" + by + " Issuer: Canary:0 Within:4m0s Tainted: DryRun:false}",
		"rotate {By:" + by + " Issuer: Canary:0 Within:0s Tainted: DryRun:true}", `continue ["x"]`, "abort " + by, "intermediate 1m0s",
	}
	if got := strings.Join(f.operator.told, "\n"); got != strings.Join(want, "\n") {
		t.Errorf("it was told\n%s", got)
	}
	lines := f.audited()
	for _, verb := range []string{"ca rotate root " + by, "ca continue " + by, "ca abort " + by, "ca rotate intermediate " + by} {
		if !strings.Contains(lines, verb) {
			t.Errorf("the audit log lacks %q:\n%s", verb, lines)
		}
	}
	if n, tainted := strings.Count(lines, "ca rotate root"), strings.Count(lines, "ca taint root "+by+" [old=old new=new issuer=r2 tainted=old within=4m0s outcome=done]"); n != 1 || tainted != 1 {
		t.Errorf("%d and %d lines for a rotation, a taint and a dry run:\n%s", n, tainted, lines)
	}
	f.operator.broken = rotation.ErrRolling
	if _, err := a.AbortRollout(ctx, &meshcav1.AbortRolloutRequest{}); err == nil || !strings.Contains(err.Error(), "under way") {
		t.Errorf("got %v", err)
	}
}

// An issuer of a root that is there already: that root is signed for by it, and no rollout begins. A share, or an emergency,
// is for another root.
func TestARootIsRepointed(t *testing.T) {
	f := start(t, "rules: []")
	a, ctx := f.Authorities, t.Context()
	for _, dry := range []bool{true, false} {
		r, err := a.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: "again", DryRun: dry})
		if err != nil || r.GetRepointed() != "again" || !strings.Contains(strings.Join(r.GetPlan(), "\n"), "the root the root stays") {
			t.Errorf("%v, %v", r, err)
		}
	}
	for _, r := range []*meshcav1.RotateRootRequest{{Issuer: "other"}, {Issuer: "again", Share: 5}, {Issuer: "again", TaintedWithin: durationpb.New(time.Minute)}, {}} {
		if got, err := a.RotateRoot(ctx, r); err != nil || got.GetRepointed() != "" {
			t.Errorf("%v: %v, %v", r, got, err)
		}
	}
	told := strings.Join(f.operator.told, "\n")
	if !strings.HasPrefix(told, "repoint to again, dry run true\nrepoint to again, dry run false\nrepoint to other, dry run false\nrotate ") || strings.Count(told, "repoint") != 3 || strings.Count(told, "rotate") != 4 {
		t.Errorf("it was told\n%s", told)
	}
	if lines := f.audited(); strings.Count(lines, "ca repoint root "+fmt.Sprintf("uid %d", os.Getuid())+" [root=the root issuer=again outcome=done]") != 1 {
		t.Errorf("the audit log:\n%s", lines)
	}
	f.operator.broken = errors.New("it has not signed yet")
	if _, err := a.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: "again"}); err == nil || !strings.Contains(err.Error(), "it has not signed yet") {
		t.Errorf("got %v", err)
	}
}

// Where a stolen intermediate is not replaced, the answer says what follows, and until when the thief is believed all the
// same.
func TestAStolenIntermediateThatIsNotReplaced(t *testing.T) {
	f := start(t, "rules: []")
	f.operator.broken = fmt.Errorf("it is tried again by itself: %w", refusal.New(refusal.UpstreamUnavailable, "the upstream did not sign"))
	_, err := f.Authorities.RotateIntermediate(t.Context(), &meshcav1.RotateIntermediateRequest{TaintedWithin: durationpb.New(time.Minute)})
	if refusal.Of(err) != refusal.UpstreamUnavailable || !strings.Contains(err.Error(), "it is tried again by itself") || !strings.Contains(err.Error(), "accepted until 1970-01-01T00:16:40Z") {
		t.Errorf("got %v", err)
	}
	if _, err := f.Authorities.RotateIntermediate(t.Context(), &meshcav1.RotateIntermediateRequest{}); err == nil || strings.Contains(err.Error(), "stolen") {
		t.Errorf("nothing is stolen: %v", err)
	}
}

// What would become of intermediates is told, leaves no audit line, and is no order.
func TestIntermediatesArePlanned(t *testing.T) {
	f := start(t, "rules: []")
	end := time.Unix(1000, 0)
	f.operator.plans = []rollout.IntermediatePlan{
		{Line: ca.LineStatus{Root: ca.Root{ID: "a", Ref: "r1"}, Chain: []*x509.Certificate{{SerialNumber: big.NewInt(90)}}, NotAfter: end}, NotAfter: end.Add(time.Hour)},
		{Line: ca.LineStatus{Root: ca.Root{ID: "b", Ref: "r2"}}, Fault: errors.New("sealed")},
	}
	got, err := f.Authorities.PlanIntermediates(t.Context(), &meshcav1.PlanIntermediatesRequest{})
	if err != nil || len(got.GetPlans()) != 2 {
		t.Fatalf("got %v, %v", got, err)
	}
	a, b := got.GetPlans()[0], got.GetPlans()[1]
	if a.GetRoot() != "a" || a.GetIssuer() != "r1" || !strings.HasSuffix(a.GetReplaces().GetSerial(), "5a") || !a.GetReplaces().GetNotAfter().AsTime().Equal(end) ||
		!a.GetNotAfter().AsTime().Equal(end.Add(time.Hour)) || a.GetFault() != "" {
		t.Errorf("got %v", a)
	}
	if b.GetRoot() != "b" || b.GetReplaces() != nil || b.GetNotAfter() != nil || b.GetFault() != "sealed" {
		t.Errorf("got %v", b)
	}
	if len(f.operator.told) != 0 || strings.Contains(f.audited(), "ca rotate") {
		t.Errorf("it was told %q, and audited:\n%s", f.operator.told, f.audited())
	}
}

func TestAuthorityVerbsRefuse(t *testing.T) {
	f := start(t, "rules: []")
	a, ctx := f.Authorities, t.Context()
	for name, err := range map[string]error{
		"share of all":   second(a.RotateRoot(ctx, &meshcav1.RotateRootRequest{Share: 100})),
		"negative bound": second(a.RotateRoot(ctx, &meshcav1.RotateRootRequest{TaintedWithin: durationpb.New(-1)})),
		"endless bound":  second(a.RotateIntermediate(ctx, &meshcav1.RotateIntermediateRequest{TaintedWithin: durationpb.New(25 * time.Hour)})),
		"long name":      second(a.RotateRoot(ctx, &meshcav1.RotateRootRequest{Issuer: strings.Repeat("x", 1000)})),
	} {
		if refusal.Of(err) != refusal.RequestMalformed {
			t.Errorf("%s: %v", name, err)
		}
	}
	if len(f.operator.told) > 0 {
		t.Errorf("it was told %q", f.operator.told)
	}
}

func second[T any](_ T, err error) error { return err }
