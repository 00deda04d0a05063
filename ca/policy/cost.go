package policy

import (
	"fmt"

	"cel.dev/cel-go/cel"
	"cel.dev/cel-go/common/cost"
)

// Bounds of what conditions can cost, in CEL's units: about one for each thing that is looked at, and a tenth for each
// byte of a text that is searched. A hundred thousand take some milliseconds.
const (
	maxCost      = 10_000  // of one condition
	maxTotalCost = 100_000 // of all conditions of a policy together: the most that one decision can take
)

// estimate is the most that an expression can cost for inputs within their bounds.
func estimate(env *cel.Env, checked *cel.Ast) (uint64, error) {
	e, err := env.EstimateCost(checked, sizes{})
	if err != nil {
		return 0, fmt.Errorf("the condition's cost cannot be told: %s", oneLine(err))
	}
	return e.Max, nil
}

// sizes are the most that an input can hold.
type sizes struct{}

var _ cost.Estimator = sizes{}

// EstimateSize bounds a variable, and what lies in one.
func (sizes) EstimateSize(n cost.AstNode) *cost.SizeEstimate {
	path := n.Path()
	if len(path) == 0 {
		return nil
	}
	most := uint64(maxNameBytes)
	switch {
	case n.Type().Kind() == cel.MapType(cel.StringType, cel.StringType).Kind():
		most = MaxEntries
	case len(path) == 2 && path[1] == "@keys":
		most = 317 // a prefix of 253, a slash, a name of 63 (Kubernetes, "Labels and Selectors")
	case len(path) == 2 && path[0] == "pod.annotations":
		most = MaxEntryBytes
	case len(path) == 2:
		most = 63
	}
	return &cost.SizeEstimate{Min: 0, Max: most}
}

// EstimateCallCost leaves functions to CEL's own figures.
func (sizes) EstimateCallCost(string, string, *cost.AstNode, []cost.AstNode) *cost.CallEstimate {
	return nil
}

// maxNameBytes is the longest name of any object.
const maxNameBytes = 253
