package policy

import (
	"context"
	"errors"
	"fmt"
	"regexp"
	"slices"
	"strings"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/ast"
	"cel.dev/cel-go/common/operators"
	"cel.dev/cel-go/common/types"
	"cel.dev/cel-go/interpreter"

	"github.com/meshca/meshca/api/refusal"
)

const (
	// MaxWhen bounds a condition's text, in bytes.
	MaxWhen = 4 << 10
	// maxNesting bounds how deep its parts lie in each other, maxNodes how many they are.
	maxNesting, maxNodes = 50, 1000
	// maxRegexp bounds the program of a regular expression, in RE2's instructions.
	maxRegexp = 1000
	// checkEvery is after how many rounds of a loop within an expression it is looked whether the call has ended.
	checkEvery = 32
)

// variables are all that a condition can ask. Each is declared under its whole name, so that one that does not exist is
// found when the policy is read.
var variables = [...]struct {
	name string
	kind *cel.Type
	fact Facts // zero: always known
}{
	{"cluster.name", cel.StringType, 0},
	{"ns.name", cel.StringType, 0},
	{"ns.labels", cel.MapType(cel.StringType, cel.StringType), NamespaceLabels},
	{"serviceAccount.name", cel.StringType, 0},
	{"pod.name", cel.StringType, PodName},
	{"pod.labels", cel.MapType(cel.StringType, cel.StringType), PodLabels},
	{"pod.annotations", cel.MapType(cel.StringType, cel.StringType), PodAnnotations},
	{"node.name", cel.StringType, NodeName},
}

// condition is a compiled expression. It is immutable.
type condition struct {
	text    string
	program cel.Program
	// uses are the facts that it can come to ask for.
	uses Facts
	// keys are the constant keys that it looks up, with the maps that it looks for them in.
	keys map[string][]string
	cost uint64 // the most that it can take
}

// language compiles conditions. The zero value is ready; its environment is made for the first one.
type language struct{ env *cel.Env }

func (l *language) compile(text string) (*condition, error) {
	switch {
	case strings.TrimSpace(text) == "":
		return nil, errors.New("the condition is empty: leave the key out where there is none")
	case len(text) > MaxWhen:
		return nil, fmt.Errorf("the condition has %d bytes; the most is %d", len(text), MaxWhen)
	}
	if err := l.open(); err != nil {
		return nil, err
	}
	checked, issues := l.env.Compile(text)
	if issues.Err() != nil {
		return nil, explain(issues)
	}
	if !checked.OutputType().IsExactType(cel.BoolType) {
		return nil, fmt.Errorf("the condition must be true or false, and this one is of type %s", checked.OutputType())
	}
	if err := patternsAreWritten(checked); err != nil {
		return nil, err
	}
	c := &condition{text: text, keys: map[string][]string{}}
	c.survey(checked)
	var err error
	if c.cost, err = estimate(l.env, checked); err != nil {
		return nil, err
	}
	if c.cost > maxCost {
		return nil, fmt.Errorf("the condition can cost up to %d, and the most is %d: one that looks at all labels for each label is too much", c.cost, maxCost)
	}
	c.program, err = l.env.Program(checked, cel.EvalOptions(cel.OptOptimize), cel.CostLimit(maxCost), cel.InterruptCheckFrequency(checkEvery))
	if err != nil {
		return nil, fmt.Errorf("the condition cannot be evaluated: %s", oneLine(err))
	}
	return c, nil
}

func (l *language) open() error {
	if l.env != nil {
		return nil
	}
	options := []cel.EnvOption{
		cel.ParserExpressionSizeLimit(MaxWhen), cel.ParserRecursionLimit(maxNesting), cel.ExpressionNodeLimit(maxNodes),
		cel.ASTValidators(cel.ValidateRegexLiterals(), cel.ValidateRegexProgramSizeLimit(maxRegexp), cel.ValidateHomogeneousAggregateLiterals()),
	}
	for _, v := range variables {
		options = append(options, cel.Variable(v.name, v.kind))
	}
	var err error
	l.env, err = cel.NewEnv(options...)
	return err
}

// explain is the first fault in an expression, with its place in it.
func explain(issues *cel.Issues) error {
	faults := issues.Errors()
	if len(faults) == 0 {
		return errors.New(oneLine(issues.Err()))
	}
	first := faults[0]
	text := oneLine(errors.New(first.Message))
	switch {
	case strings.HasPrefix(text, "undeclared reference"):
		text += "; a condition can ask for " + everything()
	case text == "invalid matches argument":
		text += ": it is no regular expression (RE2's), or too large a one"
	}
	if first.Location.Line() < 1 {
		return errors.New(text)
	}
	return fmt.Errorf("line %d, column %d: %s", first.Location.Line(), first.Location.Column()+1, text)
}

func everything() string {
	names := make([]string, len(variables))
	for i, v := range variables {
		names[i] = v.name
	}
	return strings.Join(names, ", ")
}

// patternsAreWritten refuses a regular expression that is not a text of the condition itself: what somebody else writes, such as
// a pod's owner, can take half a gigabyte and a second to compile, and neither a cost limit nor a context ends that.
func patternsAreWritten(checked *cel.Ast) (err error) {
	ast.PreOrderVisit(checked.NativeRep().Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		if e.Kind() != ast.CallKind || e.AsCall().FunctionName() != "matches" {
			return
		}
		args := e.AsCall().Args()
		if len(args) == 0 || args[len(args)-1].Kind() != ast.LiteralKind {
			err = errors.New("the pattern of matches must be a text that stands in the condition: one that is put together, or comes from a pod, can cost anything")
		}
	}))
	return err
}

// survey notes what a condition can come to ask for.
func (c *condition) survey(checked *cel.Ast) {
	tree := checked.NativeRep()
	name := func(e ast.Expr) string {
		if r := tree.ReferenceMap()[e.ID()]; r != nil {
			return r.Name
		}
		return ""
	}
	note := func(in ast.Expr, key string) {
		if n := name(in); n != "" && !slices.Contains(c.keys[key], n) {
			c.keys[key] = append(c.keys[key], n)
		}
	}
	ast.PreOrderVisit(tree.Expr(), ast.NewExprVisitor(func(e ast.Expr) {
		for _, v := range variables {
			if v.name == name(e) {
				c.uses |= v.fact
			}
		}
		switch e.Kind() {
		case ast.SelectKind:
			note(e.AsSelect().Operand(), e.AsSelect().FieldName())
		case ast.CallKind:
			call := e.AsCall()
			if args := call.Args(); call.FunctionName() == operators.Index && len(args) == 2 && args[1].Kind() == ast.LiteralKind {
				if key, ok := args[1].AsLiteral().(types.String); ok {
					note(args[0], string(key))
				}
			}
		}
	}))
}

// holds evaluates the condition. An error that is a refusal is final or passing as its reason says; another one is ctx's.
func (c *condition) holds(ctx context.Context, r *rule, f *frame) (bool, error) {
	if lack := c.uses & f.in.unknown(); lack != 0 {
		if large := lack & f.in.TooLarge; large != 0 {
			return false, refusal.New(refusal.PolicyError, "%s could not be evaluated: %s of this pod has more than %d entries or %d bytes, and nobody looks at more",
				r.quoted(), large, MaxEntries, MaxEntryBytes)
		}
		return false, refusal.New(refusal.PolicyFactsUnknown, "%s asks for %s, which is not known now", r.quoted(), lack)
	}
	out, _, err := c.program.ContextEval(ctx, f)
	if err == nil {
		return out == types.True, nil
	}
	if ctx.Err() != nil {
		return false, ctx.Err()
	}
	return false, refusal.New(refusal.PolicyError, "%s could not be evaluated: %s. Its condition: %s", r.quoted(), c.fault(err), clipTo(c.text, 300))
}

// fault says what an evaluation stumbled over, and what to write instead.
func (c *condition) fault(err error) string {
	var over interpreter.EvalCancelledError
	if errors.As(err, &over) {
		return "it took more steps than a condition may"
	}
	text := oneLine(err)
	key, missing := strings.CutPrefix(text, "no such key: ")
	if !missing {
		return text
	}
	where := c.keys[key]
	if len(where) != 1 {
		return fmt.Sprintf("there is no %q in what it looks at; ask first whether there is, with has(...) or in", clip(key))
	}
	return fmt.Sprintf("%s has no %q; if such a pod is to be passed over, begin with `%s &&`", where[0], clip(key), presence(where[0], key))
}

var identifier = regexp.MustCompile(`^[A-Za-z_][A-Za-z0-9_]*$`)

// presence asks whether a map has a key, in the shortest way that CEL has for it.
func presence(variable, key string) string {
	if identifier.MatchString(key) {
		return fmt.Sprintf("has(%s.%s)", variable, key)
	}
	return fmt.Sprintf("%q in %s", clip(key), variable)
}

// clipTo bounds a condition that is repeated in a message, and puts it on one line.
func clipTo(s string, most int) string {
	s = strings.Join(strings.Fields(s), " ")
	if len(s) > most {
		return refusal.Clip(s, most-3) + "..."
	}
	return s
}

// frame is an input as the interpreter asks for it; what it made of a map it keeps for the next condition.
type frame struct {
	in                                         Input
	podLabels, podAnnotations, namespaceLabels any
}

var _ cel.Activation = (*frame)(nil)

// ResolveName gives a variable its value.
func (f *frame) ResolveName(name string) (any, bool) {
	switch name {
	case "cluster.name":
		return types.String(f.in.Cluster), true
	case "ns.name":
		return types.String(f.in.Namespace), true
	case "ns.labels":
		return entries(&f.namespaceLabels, f.in.NamespaceLabels), true
	case "serviceAccount.name":
		return types.String(f.in.ServiceAccount), true
	case "pod.name":
		return types.String(f.in.Pod), true
	case "pod.labels":
		return entries(&f.podLabels, f.in.PodLabels), true
	case "pod.annotations":
		return entries(&f.podAnnotations, f.in.PodAnnotations), true
	case "node.name":
		return types.String(f.in.Node), true
	}
	return nil, false
}

// Parent is nobody.
func (f *frame) Parent() cel.Activation { return nil }

func entries(made *any, from map[string]string) any {
	if *made == nil {
		*made = types.NewStringStringMap(types.DefaultTypeAdapter, from)
	}
	return *made
}
