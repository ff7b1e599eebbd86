"""What the test sets consist of: subjects, their names and categories, as their authors list them.

Data alone; tasks.py makes subjects of it. MMLU: hendrycks/test categories.py. C-Eval: the names of
Baichuan-7B's evaluate_zh.py and the categories of hkust-nlp/ceval's subject_mapping.json. AGIEval:
ruixiangcui/AGIEval v1.0, its data sets with four-option questions. Gaokao: OpenLMLab/GAOKAO-Bench,
its objective questions with one answer. A test compares them with the authors' own lists.
"""

# category -> subcategory -> subjects
MMLU = {
    "humanities": {
        "philosophy": """
            formal_logic logical_fallacies moral_disputes moral_scenarios philosophy world_religions
        """,
        "history": """
            high_school_european_history high_school_us_history high_school_world_history prehistory
        """,
        "law": "international_law jurisprudence professional_law",
    },
    "social sciences": {
        "economics": "econometrics high_school_macroeconomics high_school_microeconomics",
        "geography": "high_school_geography",
        "politics": """
            high_school_government_and_politics public_relations security_studies us_foreign_policy
        """,
        "psychology": "high_school_psychology professional_psychology",
        "culture": "human_sexuality sociology",
    },
    "STEM": {
        "math": """
            abstract_algebra college_mathematics elementary_mathematics high_school_mathematics
            high_school_statistics
        """,
        "physics": "astronomy college_physics conceptual_physics high_school_physics",
        "biology": "college_biology high_school_biology",
        "chemistry": "college_chemistry high_school_chemistry",
        "computer science": """
            college_computer_science computer_security high_school_computer_science machine_learning
        """,
        "engineering": "electrical_engineering",
    },
    "other (business, health, misc.)": {
        "health": """
            anatomy clinical_knowledge college_medicine human_aging medical_genetics nutrition
            professional_medicine virology
        """,
        "business": "business_ethics management marketing",
        "other": "global_facts miscellaneous professional_accounting",
    },
}

# category -> "subject name" pairs; a name is what a prompt calls the subject
CEVAL = {
    "STEM": """
        computer_network 计算机网络 operating_system 操作系统 computer_architecture 计算机组成
        college_programming 大学编程 college_physics 大学物理 college_chemistry 大学化学
        advanced_mathematics 高等数学 probability_and_statistics 概率统计
        discrete_mathematics 离散数学 electrical_engineer 注册电气工程师
        metrology_engineer 注册计量师 high_school_mathematics 高中数学 high_school_physics 高中物理
        high_school_chemistry 高中化学 high_school_biology 高中生物
        middle_school_mathematics 初中数学 middle_school_biology 初中生物
        middle_school_physics 初中物理 middle_school_chemistry 初中化学 veterinary_medicine 兽医学
    """,
    "Social Sciences": """
        college_economics 大学经济学 business_administration 工商管理 marxism 马克思主义基本原理
        mao_zedong_thought 毛泽东思想和中国特色社会主义理论概论 education_science 教育学
        teacher_qualification 教师资格 high_school_politics 高中政治 high_school_geography 高中地理
        middle_school_politics 初中政治 middle_school_geography 初中地理
    """,
    "Humanities": """
        modern_chinese_history 近代史纲要 ideological_and_moral_cultivation 思想道德修养与法律基础
        logic 逻辑学 law 法学 chinese_language_and_literature 中国语言文学 art_studies 艺术学
        professional_tour_guide 导游资格 legal_professional 法律职业资格
        high_school_chinese 高中语文 high_school_history 高中历史 middle_school_history 初中历史
    """,
    "Others": """
        civil_servant 公务员 sports_science 体育学 plant_protection 植物保护 basic_medicine 基础医学
        clinical_medicine 临床医学 urban_and_rural_planner 注册城乡规划师 accountant 注册会计师
        fire_engineer 注册消防工程师 environmental_impact_assessment_engineer 环境影响评价工程师
        tax_accountant 税务师 physician 医师资格
    """,
}
# C-Eval Hard: the eight subjects that its authors score apart.
CEVAL_HARD = (
    "advanced_mathematics",
    "discrete_mathematics",
    "probability_and_statistics",
    "college_chemistry",
    "college_physics",
    "high_school_mathematics",
    "high_school_chemistry",
    "high_school_physics",
)
# The one name that lm-eval (and C-Eval's own list) writes differently from evaluate_zh.py.
CEVAL_LM_EVAL = {"mao_zedong_thought": "毛泽东思想和中国特色社会主义理论体系概论"}

# AGIEval's file names are its subjects.
# language -> "subject name" pairs; "_": an English subject, which is called by its file's name
AGIEVAL = {
    "en": "gaokao-english _ logiqa-en _ sat-en _ sat-en-without-passage _ sat-math _",
    "zh": """
        gaokao-biology 高考生物 gaokao-chemistry 高考化学 gaokao-chinese 高考语文
        gaokao-geography 高考地理 gaokao-history 高考历史 gaokao-mathqa 高考数学
        gaokao-physics 高考物理 jec-qa-ca 司法 jec-qa-kd 司法 logiqa-zh 公务员
    """,
}

# "subject name" pairs
GAOKAO = """
    2010-2013_English_MCQs 高考英语 2010-2022_Biology_MCQs 高考生物
    2010-2022_Chemistry_MCQs 高考化学 2010-2022_Chinese_Lang_and_Usage_MCQs 高考语文
    2010-2022_History_MCQs 高考历史 2010-2022_Math_II_MCQs 高考文科数学
    2010-2022_Math_I_MCQs 高考理科数学 2010-2022_Physics_MCQs 高考物理
    2010-2022_Political_Science_MCQs 高考政治
"""


def pairs(text: str) -> dict[str, str]:
    """{subject: name} of a list of pairs above."""
    # Any white space separates, so that the lists above may be wrapped.
    words = text.split()
    return dict(zip(words[::2], words[1::2], strict=True))
